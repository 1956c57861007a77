"""One piece of work for one agent, and what becomes of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

from fedpeft.errors import FedPEFTError
from fedpeft.v1 import federation_pb2 as pb

ID_BYTES = 16


@dataclass(frozen=True)
class TaskBody:
    """A task's content, shared by all agents that get the same."""

    content: bytes
    digest: bytes

    @classmethod
    def of(cls, content: bytes) -> TaskBody:
        """With its SHA-256."""
        return cls(content, hashlib.sha256(content).digest())


@dataclass(frozen=True)
class DurableResult:
    """A result that is durable: its body, or where it lies."""

    digest: str
    size: int
    body: bytes | None


@dataclass(frozen=True)
class Failed:
    """A task that came to nothing, and why, in the server's own words."""

    error: FedPEFTError


Outcome = DurableResult | Failed


class Owner(Protocol):
    """Who asked for work."""

    def deliver(self, work: Work, outcome: Outcome) -> None:
        """Take an outcome; called on the event loop, so it must not block."""
        ...


@dataclass(frozen=True)
class Work:
    """A task for an agent, before anyone has answered it.

    Attributes:
        max_result_bytes: a larger result is refused before it is read.
    """

    id: bytes
    run: str
    run_digest: str
    round: int
    kind: str
    agent: str
    body: TaskBody
    owner: Owner
    max_result_bytes: int

    def message(self, max_inline_bytes: int) -> pb.ServerMessage:
        """The task as it is pushed."""
        task = pb.Task(
            id=self.id,
            run=self.run,
            run_digest=bytes.fromhex(self.run_digest),
            kind=self.kind,
            round=self.round,
        )
        if len(self.body.content) <= max_inline_bytes:
            task.inline = self.body.content
        else:
            task.blob.digest, task.blob.size = self.body.digest, len(self.body.content)
        return pb.ServerMessage(task=task)


def work_id(run: str, round_: int, kind: str, agent: str, body: TaskBody) -> bytes:
    """The same for the same work, also after a restart, so that a result finds its task again."""
    digest = hashlib.sha256()
    for part in (run.encode(), str(round_).encode(), kind.encode(), agent.encode(), body.digest):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()[:ID_BYTES]
