"""Rounds as files: one checkpoint each, which is the round's transaction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from fedpeft.errors import StateError
from fedpeft.ledger.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from fedpeft.ledger.cohort import Cohort
from fedpeft.runtime.files import storage, write_atomically


class Rounds(Protocol):
    """Where a run's rounds become durable."""

    @property
    def resumes(self) -> bool:
        """Whether a round that was cut short is gone on with, its updates kept, instead of begun anew."""
        ...

    def open_round(self, number: int, draw: Callable[[], Cohort]) -> Cohort:
        """The cohort of a round that begins, before anyone is asked; the same again after a restart in it.

        Args:
            draw: draws it; where it is known from before, this isn't called.
        """
        ...

    def commit(self, checkpoint: Checkpoint) -> None:
        """Close a round durably."""
        ...

    def latest(self) -> Checkpoint | None:
        """The newest committed round; None before the first."""
        ...

    def checkpoint(self, number: int) -> Checkpoint:
        """A committed round that is still kept.

        Raises:
            StateError: it is gone, or corrupt.
        """
        ...

    def list_uncommitted(self) -> Sequence[tuple[str, int]]:
        """Updates that are durable and in no committed round yet: (client, round of its task), as they came.

        None where a round that was cut short is begun anew.
        """
        ...

    def read_spent_ledger(self) -> str | None:
        """The ledger of spent privacy; None before the first charge."""
        ...

    def commit_spent(self, ledger: str) -> None:
        """Make the ledger durable; before this returns nothing of the round may be released."""
        ...


class FolderRounds:
    """Checkpoints of one run in a folder that is there.

    Args:
        spent: the file of the ledger of spent privacy.
        keep: how many checkpoints stay, the newest ones; None: all.
    """

    resumes = False

    def __init__(self, folder: Path, spent: Path, digest: str, keep: int | None) -> None:
        self._folder = folder
        self._spent = spent
        self._digest = digest
        self._keep = keep

    def open_round(self, number: int, draw: Callable[[], Cohort]) -> Cohort:
        """Draw: a simulated round that was cut short is done again as a whole, from the same seed."""
        return draw()

    def commit(self, checkpoint: Checkpoint) -> None:
        """Write the checkpoint; old ones go."""
        write_checkpoint(self._folder / checkpoint_name(checkpoint.round), checkpoint)
        if self._keep is not None:
            for path in self._paths()[: -self._keep]:
                path.unlink()

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint.

        Raises:
            StateError: it is corrupt or of another run.
        """
        paths = self._paths()
        return read_checkpoint(paths[-1], self._digest) if paths else None

    def checkpoint(self, number: int) -> Checkpoint:
        """The checkpoint of a round.

        Raises:
            StateError: there is none, or it is corrupt or of another run.
        """
        path = self._folder / checkpoint_name(number)
        if not path.exists():
            raise StateError(f"{path} is gone, and clients are at work on its state; restore it")
        return read_checkpoint(path, self._digest)

    def list_uncommitted(self) -> Sequence[tuple[str, int]]:
        """None: a simulated round is done again as a whole."""
        return ()

    def read_spent_ledger(self) -> str | None:
        """The ledger's text as it is on the disk."""
        if not self._spent.exists():
            return None
        with storage(self._spent):
            # Damage is for its reader to find.
            return self._spent.read_text(encoding="utf-8", errors="replace")

    def commit_spent(self, ledger: str) -> None:
        """Replace the ledger."""
        write_atomically(self._spent, ledger.encode())

    def _paths(self) -> list[Path]:
        return sorted(self._folder.glob("round-*.safetensors"))


def checkpoint_name(round_: int) -> str:
    """A checkpoint's file name; names sort as rounds do."""
    return f"round-{round_:06d}.safetensors"
