"""Everything this project raises on purpose, with the exit code a command ends with.

The tree::

    FedPEFTError                 1
    ├── UsageError               2   the command line
    ├── RunFileError             3   the run file, every problem at once
    ├── DataError                4   rows, files, labels, templates, partitions
    │   └── RowsChangedError     4   other rows than those that a roll call was answered with
    ├── ModelError               5   base model, PEFT method, target modules, digests
    │   └── MemoryLimitError     5   there is not enough memory
    ├── TrainingError            6   non-finite loss, an optimiser that cannot run
    ├── StateError               7   checkpoints, run folders, ledgers
    │   └── RunExistsError       7   a finished run would be overwritten
    ├── UpdateError              8   an update that must not be folded in
    ├── FederationError          9   cohorts, clients, grids
    │   ├── QuorumError          9   too few clients answered in time
    │   ├── LimitError           9   more than one caller's share was asked for
    │   ├── ProtocolError        9   the two ends speak no common version of the protocol
    │   ├── WorkerError          9   a worker process died at its task
    │   ├── TimeLimitError       9   a task took longer than its device's owner allows
    │   └── PolicyError          9   a task is outside what its device's owner allows
    ├── PrivacyError            10   a broken privacy precondition or a spent budget
    ├── StorageError            11   disk full, unreadable or unwritable files
    ├── MissingExtraError       12   an optional package is not installed
    └── CredentialError         13   keys, certificates, tokens and roles that are refused
        └── ValidityError       13   a certificate is not valid now, by this machine's clock

Every message is one line and says what came, what is needed and what to do. A class's `code` is all that
leaves a device of an error: `fedpeft.wire.failures` has the list.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Self


class Problem(str):
    """One line that says what is wrong, with a stable code; to all who don't ask for it a plain string.

    Attributes:
        code: what programs and tests match; empty where a line has none.
    """

    code: str

    def __new__(cls, text: str, code: str = "") -> Self:
        """Make a line with its code."""
        made = super().__new__(cls, text)
        made.code = code
        return made


def codes_of(problems: Iterable[str]) -> list[str]:
    """Return the codes of those lines that have one."""
    return [problem.code for problem in problems if isinstance(problem, Problem) and problem.code]


class FedPEFTError(Exception):
    """Root of the tree; `exit_code` is what the command line ends with."""

    exit_code = 1
    code = "internal"


class UsageError(FedPEFTError):
    """The command line asks for something that does not exist or contradicts itself."""

    exit_code = 2


class RunFileError(FedPEFTError):
    """A run file cannot be used; `problems` holds one line per problem, all of them."""

    exit_code = 3
    code = "run-file"

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.source = source
        self.problems = tuple(problems)
        super().__init__("\n".join(f"{source}: {problem}" for problem in self.problems))


class DataError(FedPEFTError):
    """Rows, files, labels, templates or partitions cannot be used."""

    exit_code = 4
    code = "data"


class RowsChangedError(DataError):
    """A device's rows are not those that it answered a run's roll call with."""

    code = "rows"


class ModelError(FedPEFTError):
    """The base model or the PEFT method cannot be used, or a digest differs."""

    exit_code = 5
    code = "model"


class MemoryLimitError(ModelError):
    """There is not enough memory for a run, or its device's owner does not give it so much."""

    code = "memory"


class TrainingError(FedPEFTError):
    """Local training cannot go on: a non-finite loss, an impossible optimiser."""

    exit_code = 6
    code = "training"


class StateError(FedPEFTError):
    """A checkpoint, a run folder or a ledger is corrupt, foreign or in the way."""

    exit_code = 7
    code = "state"


class RunExistsError(StateError):
    """A finished run would be overwritten."""


class UpdateError(FedPEFTError):
    """A client's update must not be folded in: wrong shape, round, run, or not finite."""

    exit_code = 8
    code = "task"


class FederationError(FedPEFTError):
    """A round cannot be held: too few clients, no quorum, a grid that fails."""

    exit_code = 9
    code = "federation"


class QuorumError(FederationError):
    """Too few of the asked clients answered in time; the round can be tried again."""


class LimitError(FederationError):
    """More was asked for than one caller's share of a server; it can be asked for again later."""

    code = "busy"


class ProtocolError(FederationError):
    """Agent and server have no version of the protocol in common; one of them is to be updated."""


class WorkerError(FederationError):
    """A worker process died at its task."""

    code = "worker"


class TimeLimitError(FederationError):
    """A task took longer than its device's owner allows."""

    code = "time"


class PolicyError(FederationError):
    """A task is outside what its device's owner allows.

    Attributes:
        limits: the keys of `[policy]` that speak against it, and the owner's number for each; None where the
            key holds no number or the owner does not tell it.
    """

    code = "policy"

    def __init__(self, text: str, limits: Mapping[str, float | None]) -> None:
        self.limits = dict(limits)
        super().__init__(text)


class PrivacyError(FedPEFTError):
    """A privacy precondition is broken or the budget is spent."""

    exit_code = 10
    code = "privacy"


class StorageError(FedPEFTError):
    """The disk is full, or a file cannot be read or written."""

    exit_code = 11
    code = "storage"


class MissingExtraError(FedPEFTError):
    """An optional package is needed and not installed."""

    exit_code = 12
    code = "extra"


class CredentialError(FedPEFTError):
    """A key, certificate, token or role is missing, expired, revoked or not sufficient."""

    exit_code = 13
    code = "credential"


class ValidityError(CredentialError):
    """A certificate is not valid at this moment, by this machine's clock: either may change by itself."""
