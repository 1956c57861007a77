"""The last answer of each private run, as it left the device: who asks again gets the same bytes, or none."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fedpeft.errors import StateError
from fedpeft.runtime.crash_points import crash_point
from fedpeft.runtime.files import keep_newest, remove_partial, storage, write_atomically

_KEPT = 32  # runs; of others there is nothing to send again
_SUFFIX = ".answer"


@dataclass(frozen=True)
class Answer:
    """A round's one result.

    Attributes:
        round: whose.
        body: the result's content.
        memory: what the run's stages remember after it; see
        `fedpeft_client.workers.stage_memory.memory_bytes`.
    """

    round: int
    body: bytes
    memory: bytes


class AnswerShelf:
    """A folder with one file per run, by the digest of its run file.

    Raises:
        StorageError: the folder cannot be read or written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with storage(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            remove_partial(folder)

    def put(self, digest: str, answer: Answer) -> None:
        """Keep an answer durably in the place of the run's last one."""
        head = json.dumps({"round": answer.round, "body": len(answer.body)}).encode()
        crash_point("agent.answer.begun")
        write_atomically(self._path(digest), head + b"\n" + answer.body + answer.memory, mode=0o600)
        crash_point("agent.answer.durable")
        keep_newest(self._folder, f"*{_SUFFIX}", _KEPT)

    def get(self, digest: str) -> Answer | None:
        """Return the run's last answer; None if none is kept.

        Raises:
            StateError: the file is damaged.
        """
        path = self._path(digest)
        if not path.exists():
            return None
        with storage(path):
            content = path.read_bytes()
        try:
            head, _, rest = content.partition(b"\n")
            header = json.loads(head)
            size = int(header["body"])
            if len(rest) < size:
                raise ValueError
            return Answer(int(header["round"]), rest[:size], rest[size:])
        except (ValueError, KeyError, TypeError) as error:
            raise StateError(
                f"{path}: the last answer of a private run is damaged; delete the file, and the round"
                " counts as answered without one"
            ) from error

    def _path(self, digest: str) -> Path:
        return self._folder / f"{digest}{_SUFFIX}"
