"""Results and blobs in memory: for tests, and to see what the contracts ask."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fedpeft.errors import StateError, UpdateError
from fedpeft_server.store.contracts import PartialBlob, ReceivedResult


class MemoryAcceptor:
    """Keeps results until the process ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[tuple[str, bytes, str], ReceivedResult] = {}

    def accept(self, arrivals: Sequence[ReceivedResult]) -> Sequence[str | None]:
        """See `Acceptor`."""
        with self._lock:
            return [self._keep(arrival) for arrival in arrivals]

    def recall(self, run: str, round_: int, kind: str) -> Sequence[ReceivedResult]:
        """See `Acceptor`."""
        with self._lock:
            return [a for a in self._kept.values() if (a.run, a.round, a.kind) == (run, round_, kind)]

    def free_place(self, run: str, round_: int, agent: str) -> None:
        """See `Acceptor`: here there is a place for everyone."""

    def _keep(self, arrival: ReceivedResult) -> str | None:
        kept = self._kept.setdefault((arrival.run, arrival.task, arrival.agent), arrival)
        return None if kept.digest == arrival.digest else "another result for this task was accepted before"


class MemoryBlobs:
    """Keeps blobs until the process ends."""

    def __init__(self) -> None:
        self._whole: dict[str, bytes] = {}
        self._begun: dict[str, bytearray] = {}

    def has(self, digest: str) -> bool:
        """See `Blobs`."""
        return digest in self._whole

    def begin(self, digest: str, size: int) -> PartialBlob:
        """See `Blobs`."""
        return _MemoryPartial(self._begun.setdefault(digest, bytearray()), self, digest, size)

    @contextmanager
    def reading(self, digest: str) -> Iterator[bytes]:
        """See `Blobs`."""
        blob = self._whole.get(digest)
        if blob is None:
            raise StateError(f"there is no blob {digest[:12]}; ask for it again once it is uploaded")
        yield blob

    def keep(self, digest: str) -> None:
        """Turn a begun blob into a whole one if its bytes are right."""
        begun = bytes(self._begun.pop(digest))
        if hashlib.sha256(begun).hexdigest() != digest:
            raise UpdateError(f"blob {digest[:12]}: other bytes came than were announced; send it again")
        self._whole[digest] = begun


class _MemoryPartial:
    def __init__(self, begun: bytearray, blobs: MemoryBlobs, digest: str, size: int) -> None:
        self._begun, self._blobs, self._digest, self._size = begun, blobs, digest, size

    @property
    def offset(self) -> int:
        return len(self._begun)

    def write(self, data: bytes) -> None:
        if len(self._begun) + len(data) > self._size:
            raise UpdateError(f"blob {self._digest[:12]}: more than the announced {self._size} bytes came")
        self._begun += data

    def finish(self) -> None:
        if len(self._begun) != self._size:
            raise UpdateError(
                f"blob {self._digest[:12]}: {len(self._begun)} of {self._size} bytes came; send the rest"
            )
        self._blobs.keep(self._digest)

    def close(self) -> None: ...
