"""From a result's message to a durable, acknowledged outcome.

Hashing, verification of signatures and the store's transaction run on one thread of their own, for all
results that have come in meanwhile at once: under load a transaction carries many results, without load one
waits for nothing. The event loop only reads and writes.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fedpeft.errors import CredentialError, FedPEFTError, UpdateError
from fedpeft.runtime.crash_points import crash_point
from fedpeft.v1 import federation_pb2 as pb
from fedpeft_server.store.contracts import ENOUGH, Acceptor, BlobStore, ReceivedResult
from fedpeft_server.transport.callers import Caller, Gate
from fedpeft_server.transport.refusals import Reason, Refused
from fedpeft_server.transport.sessions import Hub
from fedpeft_server.transport.work import DurableResult, Failed, Outcome, Work

RETRY_S = 1.0  # between attempts to store, while the disk is full or the database locked
_REASON = 4096
Verdict = tuple[Reason, str]  # why a result does not count
LOG = logging.getLogger("fedpeft.server")


@dataclass(frozen=True)
class _Item:
    work: Work
    caller: Caller
    arrival: ReceivedResult

    @property
    def size_bytes(self) -> int:
        return len(self.arrival.body or b"") + 1024


class ResultIngest:
    """The queue between sessions and the store.

    Args:
        trouble: told one line when results cannot be stored, and None once they can be again; any thread.
        capacity: bytes of results that may wait.
    """

    def __init__(
        self,
        hub: Hub,
        acceptor: Acceptor,
        blobs: BlobStore,
        gate: Gate,
        *,
        capacity: int,
        trouble: Callable[[str | None], None],
    ) -> None:
        self._hub, self._acceptor, self._blobs, self._gate = hub, acceptor, blobs, gate
        self._capacity, self._trouble = capacity, trouble
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Condition()
        self._queue: list[_Item] = []
        self._held = 0
        self._ended = False
        self._room = asyncio.Event()
        self._room.set()
        self._thread = threading.Thread(target=self._work, name="fedpeft-intake", daemon=True)
        self._thread.start()

    async def take(self, caller: Caller, result: pb.Result) -> None:
        """Queue a result; waits while the queue is full, and with it whoever reads this agent's session.

        Raises:
            Refused: it cannot be one.
        """
        work = self._hub.pending(caller.name, result.task)
        if work is None:
            why = "nobody waits for this task any more"
            kind = self._hub.reason_unwanted(caller.name, result.task)
            self._hub.shares.count(caller.name, kind, why)
            self._acknowledge(caller.name, result.task, why, spare=kind is Reason.SPARE)
            return
        if result.WhichOneof("body") == "blob" and len(result.blob.digest) != hashlib.sha256().digest_size:
            raise Refused(Reason.MALFORMED, UpdateError("a result came whose content has no SHA-256"))
        if not self._hub.queue(work):  # the one that is being stored is answered
            self._hub.shares.count(caller.name, Reason.NOT_ASKED, "a result came again while it was stored")
            return
        if result.WhichOneof("body") is None:
            self._hub.settle(work, Failed(self._hub.reason_of(caller.name, result.failure)))
            self._acknowledge(caller.name, result.task, "")
            return
        item = _Item(work, caller, _arrival(work, result))
        while self._held >= self._capacity:
            self._room.clear()
            await self._room.wait()
        self._held += item.size_bytes
        with self._lock:
            self._queue.append(item)
            self._lock.notify()

    @property
    def waiting_bytes(self) -> int:
        """Bytes of results that wait; on any thread."""
        return self._held

    def end(self) -> None:
        """Store what has come in, then stop; blocks, so not on the event loop."""
        with self._lock:
            self._ended = True
            self._lock.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._lock:
                while not self._queue and not self._ended:
                    self._lock.wait()
                batch, self._queue = self._queue, []
                if not batch:
                    return
            freed = self._hub.freed  # before anything is judged: see `Hub.defer`
            verdicts = self._verdicts(batch)
            if verdicts is not None:
                self._loop.call_soon_threadsafe(self._finish, batch, verdicts, freed)

    def _verdicts(self, batch: list[_Item]) -> list[Verdict | None] | None:
        """Why each item does not count, None for those that are durable; None altogether if cut short."""
        batch[:] = [replace(item, arrival=_hash(item.arrival)) for item in batch]
        reasons = [self._unsound(item) for item in batch]
        sound = [index for index, reason in enumerate(reasons) if reason is None]
        crash_point("server.results.verified")
        stored = self._store([batch[index].arrival for index in sound])
        if stored is None:
            return None
        crash_point("server.results.durable")
        for index, reason in zip(sound, stored, strict=True):
            if reason is not None:
                reasons[index] = (Reason.SPARE if reason == ENOUGH else Reason.STORED, reason)
        return reasons

    def _unsound(self, item: _Item) -> Verdict | None:
        try:
            if item.arrival.body is None and not self._blobs.has(item.arrival.digest):
                return Reason.STORED, "its blob is not here; send it first"
            self._gate.verify(item.caller, item.arrival)
        except CredentialError as error:
            return Reason.CALLER, str(error)
        except FedPEFTError as error:
            return Reason.SIGNATURE, str(error)
        except Exception as error:  # one result must not end the thread that all results need
            LOG.exception("a result of %s could not be checked", item.caller.name)
            return Reason.MALFORMED, f"it could not be checked ({type(error).__name__})"
        return None

    def _store(self, arrivals: Sequence[ReceivedResult]) -> Sequence[str | None] | None:
        """Store, for as long as it takes: until then nothing is acknowledged, and agents keep results."""
        failed = False
        while arrivals:
            try:
                verdicts = self._acceptor.accept(arrivals)
            except FedPEFTError as error:
                failed = True
                self._trouble(str(error))
                with self._lock:
                    if self._ended or self._lock.wait_for(lambda: self._ended, RETRY_S):
                        return None
                continue
            if failed:
                self._trouble(None)
            return verdicts
        return []

    def _finish(self, batch: Sequence[_Item], verdicts: Sequence[Verdict | None], freed: int) -> None:
        """On the loop: tell agents and runs."""
        for item, verdict in zip(batch, verdicts, strict=True):
            self._held -= item.size_bytes
            arrival, reason, why = item.arrival, None, None
            if verdict is not None:
                why, reason = verdict
                if why is Reason.SPARE and self._hub.defer(item.work, freed):
                    continue
                self._hub.shares.count(item.caller.name, why, reason)
            outcome: Outcome = (
                DurableResult(arrival.digest, arrival.size, arrival.body)
                if reason is None
                else Failed(UpdateError(reason[:_REASON]))
            )
            self._hub.settle(item.work, outcome)
            self._acknowledge(item.caller.name, item.work.id, reason or "", spare=why is Reason.SPARE)
        self._room.set()

    def _acknowledge(self, name: str, task: bytes, reason: str, *, spare: bool = False) -> None:
        ack = pb.Ack(task=task, accepted=not reason, reason=reason[:_REASON], spare=spare)
        self._hub.tell(name, pb.ServerMessage(ack=ack))


def _arrival(work: Work, result: pb.Result) -> ReceivedResult:
    """What came, its inline body not yet hashed."""
    inline = result.WhichOneof("body") == "inline"
    return ReceivedResult(
        run=work.run,
        run_digest=work.run_digest,
        round=work.round,
        kind=work.kind,
        agent=work.agent,
        task=work.id,
        digest="" if inline else result.blob.digest.hex(),
        size=len(result.inline) if inline else result.blob.size,
        body=result.inline if inline else None,
        signature=result.signature,
    )


def _hash(arrival: ReceivedResult) -> ReceivedResult:
    if arrival.body is None:
        return arrival
    return replace(arrival, digest=hashlib.sha256(arrival.body).hexdigest())
