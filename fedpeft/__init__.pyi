"""The public names, for type checkers; `fedpeft/__init__.py` says where each is loaded from."""

from fedpeft.api import Result as Result
from fedpeft.api import Server as Server
from fedpeft.api import attack as attack
from fedpeft.api import check as check
from fedpeft.api import connect as connect
from fedpeft.api import evaluate as evaluate
from fedpeft.api import file_format as file_format
from fedpeft.api import load_run as load_run
from fedpeft.api import lora_rule as lora_rule
from fedpeft.api import metric as metric
from fedpeft.api import peft_method as peft_method
from fedpeft.api import plan as plan
from fedpeft.api import process_unchanged as process_unchanged
from fedpeft.api import resume as resume
from fedpeft.api import simulate as simulate
from fedpeft.api import sink as sink
from fedpeft.api import stage as stage
from fedpeft.api import strategy as strategy
from fedpeft.api import submit as submit
from fedpeft.config.sections import RunConfig as RunConfig
from fedpeft.config.sections import Section as Section
from fedpeft.config.traits import Trait as Trait
from fedpeft.errors import CredentialError as CredentialError
from fedpeft.errors import DataError as DataError
from fedpeft.errors import FederationError as FederationError
from fedpeft.errors import FedPEFTError as FedPEFTError
from fedpeft.errors import MissingExtraError as MissingExtraError
from fedpeft.errors import ModelError as ModelError
from fedpeft.errors import PrivacyError as PrivacyError
from fedpeft.errors import RunFileError as RunFileError
from fedpeft.errors import StateError as StateError
from fedpeft.errors import StorageError as StorageError
from fedpeft.errors import TrainingError as TrainingError
from fedpeft.errors import UpdateError as UpdateError
from fedpeft.errors import UsageError as UsageError
from fedpeft.ledger.records import Evaluation as Evaluation
from fedpeft.ledger.records import Finished as Finished
from fedpeft.ledger.records import Round as Round
from fedpeft.ledger.records import Started as Started
from fedpeft.rounds.strategy_table import Strategy as Strategy
from fedpeft.stages.base import Stage as Stage
from fedpeft.stages.base import StageContext as StageContext
from fedpeft.updates.update import Update as Update

__version__: str
__all__: list[str]
