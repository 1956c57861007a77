"""What the transport asks of the room that stores things: accepted results and blobs.

Everything here is called from worker threads, never on the event loop, and by several threads at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

ENOUGH = "enough others had answered before"  # the verdict on a result for which there is no place


@dataclass(frozen=True)
class ReceivedResult:
    """One agent's result for one task, verified as far as the transport can.

    Attributes:
        run: the server's name for the run.
        run_digest: of what agents are told of the run, hex; empty for a result that is recalled.
        round: 0 at roll call.
        kind: the task's kind, "train" or "query.hello".
        agent: who sent it, by its certificate where there is one.
        task: the task's id, 16 bytes; equal work has an equal id after a restart.
        digest: SHA-256 of the body, hex; verified.
        size: of the body in bytes.
        body: the body itself; None where it lies in the blob store under `digest`.
        signature: by the device key, verified before; empty on connections without certificates.
    """

    run: str
    run_digest: str
    round: int
    kind: str
    agent: str
    task: bytes
    digest: str
    size: int
    body: bytes | None = None
    signature: bytes = b""


class Acceptor(Protocol):
    """Makes results durable before they are acknowledged."""

    def accept(self, arrivals: Sequence[ReceivedResult]) -> Sequence[str | None]:
        """Make all of them durable in one transaction; one verdict each, in order.

        A result that is there already (same run, task and agent) is accepted again without being stored
        twice if its digest is the same, and refused if it differs.

        Returns:
            None for a result that is durable now, else one line that says why it does not count. `ENOUGH`:
            it is as sound as others, and its round's places are taken; one may become free.

        Raises:
            StorageError: nothing was stored. No result is acknowledged; agents keep theirs and send again.
        """
        ...

    def recall(self, run: str, round_: int, kind: str) -> Sequence[ReceivedResult]:
        """Results that were accepted before, also before a restart: they are not asked for again."""
        ...

    def free_place(self, run: str, round_: int, agent: str) -> None:
        """A result that was accepted does not count after all, so it takes no place.

        Not durable: whoever finds it unsound finds it so again after a restart.
        """
        ...


class PartialBlob(Protocol):
    """A blob on its way in. One thread at a time uses it."""

    @property
    def offset(self) -> int:
        """Bytes that are there already; writing goes on from here."""
        ...

    def write(self, data: bytes) -> None:
        """Append.

        Raises:
            UpdateError: beyond the declared size.
            StorageError: the disk is full.
        """
        ...

    def finish(self) -> None:
        """Verify size and digest and make the blob durable under its digest.

        Raises:
            UpdateError: the bytes are not those announced; the partial blob is gone.
        """
        ...

    def close(self) -> None:
        """Put it aside; what came stays for the next attempt. After `finish`, nothing."""
        ...


class BlobStore(Protocol):
    """Bytes by their SHA-256 (hex)."""

    def has(self, digest: str) -> bool:
        """Whether the whole blob is there."""
        ...

    def begin(self, digest: str, size: int) -> PartialBlob:
        """Open a partial blob, new or begun before.

        Raises:
            StorageError: it cannot be written.
            LimitError: another upload of it is under way.
        """
        ...

    def reading(self, digest: str) -> AbstractContextManager[bytes | memoryview]:
        """A whole blob while the block lasts.

        Raises:
            StateError: no such blob.
            StorageError: it cannot be read.
        """
        ...
