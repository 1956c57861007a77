"""Everything this project raises on purpose, with the exit code a command ends with.

The tree::

    FedPEFTError                 1
    ├── UsageError               2   the command line
    ├── RunFileError             3   the run file, every problem at once
    ├── DataError                4   rows, files, labels, templates, partitions
    ├── ModelError               5   base model, PEFT method, target modules, digests
    ├── TrainingError            6   non-finite loss, an optimiser that cannot run
    ├── StateError               7   checkpoints, run folders, ledgers
    │   └── RunExistsError       7   a finished run would be overwritten
    ├── UpdateError              8   an update that must not be folded in
    ├── FederationError          9   cohorts, clients, grids
    │   ├── QuorumError          9   too few clients answered in time
    │   └── LimitError           9   more than one caller's share was asked for
    ├── PrivacyError            10   a broken privacy precondition or a spent budget
    ├── StorageError            11   disk full, unreadable or unwritable files
    ├── MissingExtraError       12   an optional package is not installed
    └── CredentialError         13   keys, certificates, tokens and roles that are refused

Every message is one line and says what came, what is needed and what to do.
"""

from collections.abc import Sequence


class FedPEFTError(Exception):
    """Root of the tree; `exit_code` is what the command line ends with."""

    exit_code = 1


class UsageError(FedPEFTError):
    """The command line asks for something that does not exist or contradicts itself."""

    exit_code = 2


class RunFileError(FedPEFTError):
    """A run file cannot be used; `problems` holds one line per problem, all of them."""

    exit_code = 3

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.source = source
        self.problems = tuple(problems)
        super().__init__("\n".join(f"{source}: {problem}" for problem in self.problems))


class DataError(FedPEFTError):
    """Rows, files, labels, templates or partitions cannot be used."""

    exit_code = 4


class ModelError(FedPEFTError):
    """The base model or the PEFT method cannot be used, or a digest differs."""

    exit_code = 5


class TrainingError(FedPEFTError):
    """Local training cannot go on: a non-finite loss, an impossible optimiser."""

    exit_code = 6


class StateError(FedPEFTError):
    """A checkpoint, a run folder or a ledger is corrupt, foreign or in the way."""

    exit_code = 7


class RunExistsError(StateError):
    """A finished run would be overwritten."""


class UpdateError(FedPEFTError):
    """A client's update must not be folded in: wrong shape, round, run, or not finite."""

    exit_code = 8


class FederationError(FedPEFTError):
    """A round cannot be held: too few clients, no quorum, a grid that fails."""

    exit_code = 9


class QuorumError(FederationError):
    """Too few of the asked clients answered in time; the round can be tried again."""


class LimitError(FederationError):
    """More was asked for than one caller's share of a server; it can be asked for again later."""


class PrivacyError(FedPEFTError):
    """A privacy precondition is broken or the budget is spent."""

    exit_code = 10


class StorageError(FedPEFTError):
    """The disk is full, or a file cannot be read or written."""

    exit_code = 11


class MissingExtraError(FedPEFTError):
    """An optional package is needed and not installed."""

    exit_code = 12


class CredentialError(FedPEFTError):
    """A key, certificate, token or role is missing, expired, revoked or not sufficient."""

    exit_code = 13
