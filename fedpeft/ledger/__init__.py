"""The durable record of a run."""

from fedpeft.ledger.checkpoint import Checkpoint
from fedpeft.ledger.cohort import Cohort
from fedpeft.ledger.folder_rounds import Rounds
from fedpeft.ledger.run_folder import RunFolder

__all__ = ["Checkpoint", "Cohort", "Rounds", "RunFolder"]
