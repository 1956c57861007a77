"""What client-side stages remember between rounds (error feedback), as bytes and durably on the agent.

A result and the memory that it leaves belong together: if the result never counts, the memory is as it was
before. So the file of a run holds both, and the task between them.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedpeft.errors import StateError
from fedpeft.runtime.crash_points import crash_point
from fedpeft.runtime.files import storage, write_atomically

Memory = Mapping[str, NDArray[Any]]
_HELD = 2  # runs: a server holds one or two at a time
_KEPT = 32  # files


def memory_bytes(memory: Memory) -> bytes:
    """Named arrays as bytes; empty for none."""
    return save({name: memory[name] for name in sorted(memory)}) if memory else b""


def memory_of(content: bytes) -> dict[str, NDArray[Any]]:
    """Inverse of `memory_bytes`."""
    return dict(load(content)) if content else {}


@dataclass(frozen=True)
class Remembered:
    """One run's memory around the task that was done last.

    Attributes:
        task: its id, hex; empty before the first.
        before, after: see `memory_bytes`.
        run: the server's name for the run, for people who look at the file.
    """

    task: str = ""
    before: bytes = b""
    after: bytes = b""
    run: str = ""

    def for_task(self, task: str) -> bytes:
        """The memory that a task starts from: a task that is done again starts where it started."""
        return self.before if task == self.task else self.after

    def without(self, task: str) -> Remembered:
        """As if that task had not been done."""
        return Remembered("", self.before, self.before, self.run) if task == self.task else self


@dataclass
class StageMemory:
    """The memories of runs, one file each, in the folder of the agent's state; see `usage.run_key`.

    A memory is as large as the run's adapter, twice, and nobody tells an agent that a run has ended. So few
    are held, and the files of runs that were worked on longest ago go: a run that comes back after so many
    others begins its memory anew, as it would on another device.

    Raises:
        StorageError, StateError: the folder cannot be read or written, or a file in it is corrupt.
    """

    folder: Path
    _known: OrderedDict[str, Remembered] = field(default_factory=OrderedDict)

    def get(self, run: str) -> Remembered:
        """What is remembered of a run."""
        remembered = self._known.get(run)
        return self._hold(run, self._read(run) if remembered is None else remembered)

    def put(self, run: str, remembered: Remembered) -> None:
        """Replace it durably; a run that remembers nothing has no file."""
        path = self._path(run)
        if not (remembered.before or remembered.after):
            with storage(path):
                path.unlink(missing_ok=True)
        else:
            crash_point("agent.memory.begun")
            fresh = not path.exists()
            write_atomically(path, _file(remembered), mode=0o600)
            crash_point("agent.memory.durable")
            if fresh:
                self._prune()
        self._hold(run, remembered)

    def _hold(self, run: str, remembered: Remembered) -> Remembered:
        self._known[run] = remembered
        self._known.move_to_end(run)
        while len(self._known) > _HELD:
            self._known.popitem(last=False)
        return remembered

    def _prune(self) -> None:
        """Let the files go that were written longest ago, if there are too many."""
        with storage(self.folder):
            files = sorted(self.folder.glob("*.memory"), key=lambda file: file.stat().st_mtime_ns)
            for file in files[:-_KEPT]:
                file.unlink(missing_ok=True)

    def _path(self, run: str) -> Path:
        with storage(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return self.folder / f"{run}.memory"

    def _read(self, run: str) -> Remembered:
        path = self._path(run)
        if not path.exists():
            return Remembered()
        with storage(path):
            content = path.read_bytes()
        try:
            head, _, rest = content.partition(b"\n")
            header = json.loads(head)
            before, after = rest[: header["before"]], rest[header["before"] :]
            if len(after) != header["after"]:
                raise ValueError
            memory_of(before), memory_of(after)
            return Remembered(str(header["task"]), before, after, str(header.get("run", "")))
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise StateError(
                f"{path}: the memory of a run is corrupt; delete the file, the run begins it anew"
            ) from error


def _file(remembered: Remembered) -> bytes:
    header = {
        "task": remembered.task,
        "run": remembered.run,
        "before": len(remembered.before),
        "after": len(remembered.after),
    }
    return json.dumps(header).encode() + b"\n" + remembered.before + remembered.after
