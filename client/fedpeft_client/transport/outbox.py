"""Results that the server has not acknowledged, on the disk: neither a restart nor a lost line loses one."""

from __future__ import annotations

import struct
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError

from fedpeft.runtime.crash_points import crash_point
from fedpeft.runtime.files import remove_partial, storage, write_atomically
from fedpeft.v1 import federation_pb2 as pb

_KEPT = 64  # results; older ones are of tasks that nobody asks for any more
_LENGTH = struct.Struct("<I")
_SUFFIX = ".result"


@dataclass(frozen=True)
class OutboxResult:
    """A result and the task that it answers (without the task's body)."""

    task: pb.Task
    body: bytes


class Outbox:
    """A folder with one file per result, by task id.

    Raises:
        StorageError: the folder cannot be read or written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with storage(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            remove_partial(folder)
            files = sorted(folder.glob(f"*{_SUFFIX}"), key=lambda file: file.stat().st_mtime_ns)
        self._kept: OrderedDict[bytes, None] = OrderedDict(
            (bytes.fromhex(file.stem), None) for file in files if _is_hex(file.stem)
        )

    def __contains__(self, task: bytes) -> bool:
        return task in self._kept

    def put(self, finished: OutboxResult) -> None:
        """Keep a result durably; the oldest goes when there are too many."""
        header = finished.task.SerializeToString()
        crash_point("agent.result.begun")
        write_atomically(
            self._path(finished.task.id), _LENGTH.pack(len(header)) + header + finished.body, mode=0o600
        )
        crash_point("agent.result.durable")
        self._kept[finished.task.id] = None
        while len(self._kept) > _KEPT:
            self.drop(next(iter(self._kept)))

    def get(self, task: bytes) -> OutboxResult | None:
        """A kept result; None if it is gone or unreadable, and then it is done again."""
        path = self._path(task)
        try:
            content = path.read_bytes()
            (length,) = _LENGTH.unpack_from(content)
            start = _LENGTH.size
            return OutboxResult(
                pb.Task.FromString(content[start : start + length]), content[start + length :]
            )
        except (OSError, struct.error, DecodeError):
            self.drop(task)
            return None

    def drop(self, task: bytes) -> None:
        """Forget a result."""
        self._kept.pop(task, None)
        with storage(self._folder):
            self._path(task).unlink(missing_ok=True)

    def _path(self, task: bytes) -> Path:
        return self._folder / f"{task.hex()}{_SUFFIX}"


def _is_hex(text: str) -> bool:
    return len(text) % 2 == 0 and set(text) <= set("0123456789abcdef")
