"""Where the model of a run is, while this process holds the run's rounds: what all such places are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from fedpeft.config.sections import RunConfig
from fedpeft.config.traits import Trait
from fedpeft.flower.server_app import RoundServer
from fedpeft.ledger import Checkpoint, RunFolder
from fedpeft.ledger.folder_rounds import checkpoint_name
from fedpeft.ledger.run_folder import open_or_create
from fedpeft.ledger.run_place import CHECKPOINTS
from fedpeft.runtime.crash_points import crash_point
from fedpeft.runtime.files import storage, write_atomically
from fedpeft.spaces import space_traits
from fedpeft.spaces.seed_options import SUPPORTED_RULES
from fedpeft_server.runs.journal_lines import LoggedProgress
from fedpeft_server.store import Reference, StoredRounds

Hold = Callable[[RoundServer, Checkpoint | None], Checkpoint]  # holds the rounds after a checkpoint


class HeldElsewhereError(Exception):
    """The run turned out to be one whose rounds can be held beside its model only."""


@dataclass(frozen=True)
class RunStorage:
    """Where a run is written down.

    Attributes:
        reference: of the store, for another process.
        path: of the run's folder.
    """

    id: str
    run: RunConfig
    reference: Reference
    path: Path
    rounds: StoredRounds

    def open(self) -> RunFolder:
        """The run's folder, begun or not; one process at a time has it."""
        return open_or_create(self.path, self.run, rounds=self.rounds)


class ModelHost(Protocol):
    """Keeps one run's model from attempt to attempt."""

    def hold(self, book: RunStorage, progress: LoggedProgress, hold: Hold) -> None:
        """Bring the run from its last committed round to its end.

        Raises:
            HeldElsewhereError: the rounds cannot be held without the model.
            FedPEFTError, Halt: as `hosting.Host.attempt`.
        """
        ...

    def export(self, book: RunStorage) -> None:
        """Write the adapter of the last committed round, if the model is loaded.

        Raises:
            FedPEFTError: it cannot be written.
        """
        ...

    def snapshot(self, book: RunStorage, path: Path) -> None:
        """Write what the run has reached to a new folder; a round is committed. On the run's thread.

        Raises:
            FedPEFTError: it cannot be written.
        """
        ...

    def release(self) -> None:
        """Let go of the model."""
        ...


def write_checkpoints(folder: RunFolder, rounds: StoredRounds) -> None:
    """The start and the end as files: what compressing, replaying and merging ask of a run's folder."""
    for number, content in rounds.contents().items():
        place = folder.path / CHECKPOINTS / checkpoint_name(number)
        with storage(place):
            known = place.exists() and place.read_bytes() == content
        if not known:
            write_atomically(place, content)
        crash_point("server.run.checkpoint-copied")


def counts_alone(run: RunConfig) -> bool:
    """Whether the rounds of a run can be held by a process without its model.

    A state of seed-scalars is announced with the fingerprint of its weights. NumPy and the compiled kernels
    can make it where directions move all weights; what else looks at weights between rounds needs torch.
    """
    if run.federation.lora_rule is not None or run.groups or run.output.tensorboard or run.output.sinks:
        return False
    traits = space_traits(run.space.kind)
    if Trait.SEEDED_MOVES in traits:
        some = run.training.kind == "zeroth-order" and run.training.rule in SUPPORTED_RULES
        return not some and find_spec("numba") is not None
    return Trait.SENDS_ENTRIES in traits
