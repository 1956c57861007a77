"""Runs that take the daemon itself down, which holds the models of some.

While the daemon is at a model, a note says for which run. If it does not come back from there, the next start
finds the note. A kill from outside says nothing of the run; what counts is a crash, whose trace is in a file
of its own, the system's out-of-memory killer, and an end that had to be forced.
"""

from __future__ import annotations

import faulthandler
import json
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fedpeft.runtime.files import storage, write_atomically

LOG = logging.getLogger("fedpeft.server")
NOTES, CRASH = "risks", "crash.txt"
_OOM_KILLS = "oom_kill "  # in /proc/vmstat: since the machine started, of all processes


@dataclass(frozen=True)
class _Note:
    """What is known of one run.

    Attributes:
        reached: the round that was committed last.
        losses: of the daemon, at that round.
        at_work: whether the daemon is at its model.
        oom_kills: how often the system had run out of memory when it began.
    """

    reached: int
    losses: int = 0
    at_work: bool = False
    oom_kills: int = 0


class Risks:
    """The notes of one state folder; one thread of a run writes its own.

    Raises:
        StorageError: from all methods, when a note cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._crash = folder / NOTES, folder / CRASH

    def take_stock(self, unended: Collection[str]) -> None:
        """At a start: count the daemon's last end against the runs that it was at work for.

        Args:
            unended: runs that may go on; the notes of others go.
        """
        crashed = self._is_traced()
        for path in sorted(self._folder.glob("*.json")):
            note = self._read(path.stem)
            if path.stem not in unended:
                path.unlink(missing_ok=True)
            elif note is not None and note.at_work:
                lost = crashed or _oom_kills() > note.oom_kills
                self._write(path.stem, replace(note, at_work=False, losses=note.losses + lost))

    def trace_crashes(self) -> None:
        """From now on, a crash of this process leaves its trace for the next start."""
        with storage(self._crash):
            faulthandler.enable(self._crash.open("w", encoding="utf-8"))  # as long as the process

    def losses(self, run_id: str) -> int:
        """How often the daemon was lost over a run since it came on by a round."""
        note = self._read(run_id)
        return 0 if note is None else note.losses

    @contextmanager
    def at_work(self, run_id: str, reached: int) -> Iterator[None]:
        """While the daemon is at a run's model, after that round."""
        before = self._read(run_id)
        losses = before.losses if before is not None and before.reached == reached else 0
        note = _Note(reached, losses, True, _oom_kills())
        self._write(run_id, note)
        try:
            yield
        finally:
            self._write(run_id, replace(note, at_work=False))

    def _is_traced(self) -> bool:
        with suppress(OSError):
            trace = self._crash.read_text(encoding="utf-8", errors="replace")
            if trace.strip():
                LOG.warning("the server crashed when it ran last: %s", " ".join(trace.split())[:2000])
                return True
        return False

    def _read(self, run_id: str) -> _Note | None:
        try:
            return _Note(**json.loads(self._path(run_id).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # none, or of another version
            return None

    def _write(self, run_id: str, note: _Note) -> None:
        with storage(self._folder):
            self._folder.mkdir(mode=0o700, exist_ok=True)
        write_atomically(self._path(run_id), json.dumps(asdict(note)).encode())

    def _path(self, run_id: str) -> Path:
        return self._folder / f"{run_id}.json"


def _oom_kills() -> int:
    """How often this machine's system has ended a process for want of memory; 0 where it does not say."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            if line.startswith(_OOM_KILLS):
                return int(line.removeprefix(_OOM_KILLS))
    return 0
