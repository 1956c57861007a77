"""Starts that servers computed, on the agent's disk by run: a worker that begins anew asks nobody again."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fedpeft.errors import StateError
from fedpeft.runtime.files import keep_newest, storage, write_atomically
from fedpeft.wire.task_content import is_digest

_KEPT = 8  # files; each is as large as two adapters


@dataclass(frozen=True)
class StartShelf:
    """One file for each run, named by the run's digest and the content's; for starts that were loaded.

    Raises:
        StorageError: the folder cannot be read or written.
        StateError: a run's digest is none.
    """

    folder: Path

    def put(self, run_digest: str, content: bytes) -> None:
        """Keep what came; of other runs only the newest few stay."""
        refuse_no_digest(run_digest)
        own = self._path(run_digest, content)
        with storage(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for old in self._of(run_digest):
                if old != own:
                    old.unlink(missing_ok=True)
        write_atomically(own, content, mode=0o600)
        keep_newest(self.folder, "*.start", _KEPT)

    def get(self, run_digest: str) -> bytes:
        """What is kept of a run; empty if nothing is, or if it has changed on the disk."""
        refuse_no_digest(run_digest)
        with storage(self.folder):
            for path in self._of(run_digest):
                content = path.read_bytes()
                if path == self._path(run_digest, content):
                    return content
        return b""

    def _of(self, run_digest: str) -> list[Path]:
        return sorted(self.folder.glob(f"{run_digest}-*.start"))

    def _path(self, run_digest: str, content: bytes) -> Path:
        return self.folder / f"{run_digest}-{hashlib.sha256(content).hexdigest()}.start"


def refuse_no_digest(run_digest: str) -> None:
    """Refuse a name that would be part of a file's and is no digest.

    Raises:
        StateError: it is none.
    """
    if not is_digest(run_digest):
        raise StateError(f"{run_digest[:20]!r} is no digest of a run; nothing is read or written under it")
