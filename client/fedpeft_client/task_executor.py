"""The agent's work, whatever the connection does: tasks in, the owner's policy, the worker, results out.

A task ends in one of three ways: its result is acknowledged, it is refused, or nobody wants it any more.
Until then it survives everything: a broken connection (the server pushes it again), the worker's death (it
is done again if a signal killed the worker; else, and the second time, an error is the result), a restart of
the agent (a result that was done lies in the outbox; one that wasn't is done again, from the same memory,
with the same bytes).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import random
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc

from fedpeft.credentials import Material, UpdateHeader, sign_body_digest
from fedpeft.errors import (
    FederationError,
    FedPEFTError,
    LimitError,
    PolicyError,
    StorageError,
    UpdateError,
    WorkerError,
)
from fedpeft.runtime.crash_points import crash_point
from fedpeft.runtime.frames import Frame
from fedpeft.v1 import federation_pb2 as pb
from fedpeft.wire.failures import from_record, to_failure, to_refusal, to_text
from fedpeft_client.agent_metrics import AgentMetrics
from fedpeft_client.policy.admission import Admission
from fedpeft_client.policy.owner_policy import Policy, find_unwanted_metrics, over_bytes, refuse
from fedpeft_client.policy.usage import UsageBook, run_key
from fedpeft_client.status import AgentStatusFile
from fedpeft_client.transport.dialing import error_of, pauses
from fedpeft_client.transport.egress import contents
from fedpeft_client.transport.outbox import Outbox, OutboxResult
from fedpeft_client.transport.server_bounds import shorten
from fedpeft_client.transport.session import Session
from fedpeft_client.workers.stage_memory import Remembered, StageMemory
from fedpeft_client.workers.worker_process import CLIENT_APP, REPLICAS, STARTS, Worker, WorkerKilledError

LOG = logging.getLogger("fedpeft.client")
MAX_QUEUED = 256  # tasks; one per run and round, so more is no honest server's
MAX_BODY_BYTES = 4 << 30
_NEW_DAY_S = 60.0  # between two looks whether a day has begun
STORAGE_PATIENCE_S = 300.0  # for which a task waits for room on the disk before the server is told


@dataclass(frozen=True)
class AgentConfig:
    """What an agent works with.

    Attributes:
        app: the client's functions, named by us and never by a message.
        device: what is trained on, by the name that settings give it.
        files: how the rows' text files are written: `Own`'s encoding, separator and quoting.
    """

    name: str
    data: Path
    model: str
    policy: Policy
    app: str = CLIENT_APP
    device: str = "cpu"
    files: Mapping[str, str | None] = field(default_factory=dict)


class TaskExecutor:
    """One agent's tasks."""

    def __init__(
        self, trade: AgentConfig, home: Path, workshop: Worker, status: AgentStatusFile, metrics: AgentMetrics
    ) -> None:
        self._trade, self._workshop, self._status, self._metrics = trade, workshop, status, metrics
        self._memory = StageMemory(home / "memory")
        self._outbox = Outbox(home / "outbox")
        self._starts, self._replicas = home / STARTS, home / REPLICAS
        self._book = UsageBook(home / "usage.json")
        self._admission = Admission(
            trade.name,
            trade.policy,
            home,
            self._book,
            workshop,
            needs_run=trade.app == CLIENT_APP,
            has_model=bool(trade.model),
        )
        most_mib = trade.policy.max_memory_mib  # a body is held here before a worker gets it
        self._most_bytes = min(MAX_BODY_BYTES, math.inf if most_mib is None else most_mib * 2**20)
        self._link: Session | None = None
        self._material: Material | None = None
        self._linked = asyncio.Event()
        self._tasks: dict[bytes, pb.Task] = {}  # queued or at work
        self._at_work = b""  # the one of them that the workshop has
        self._queue: asyncio.Queue[bytes] = asyncio.Queue()
        self._delivering: set[bytes] = set()
        self._held_back: set[bytes] = set()  # results that today's bytes have no room for
        self._begun: dict[bytes, bytearray] = {}  # bodies that are half fetched
        self._greeting = (b"", b"")  # digest and body of the last roll call, until a round begins
        self._errands: set[asyncio.Task[None]] = set()
        self._rested = time.monotonic()
        status.usage, status.accountant = self._book.usage, self._admission.accountant

    def set_session(self, link: Session | None, material: Material | None = None) -> None:
        """A session has begun, with the key that signs results if there is one; without a link: it ended."""
        self._link, self._material = link, material
        (self._linked.set if link is not None else self._linked.clear)()

    async def handle(self, message: pb.ServerMessage) -> None:
        """One message of the server's."""
        kind = message.WhichOneof("message")
        if kind == "task":
            await self._take(message.task)
        elif kind == "ack":
            self._handle_ack(message.ack)
        elif kind == "cancel":
            self._handle_cancel(message.cancel)
        elif kind == "notice":
            run, text = message.notice.run[:100], shorten(message.notice.text)
            LOG.info("the server says of run %s: %s", run, text)
            self._status.record_notice(f"{run}: {text}")
        elif kind == "goodbye":
            LOG.info("the server says goodbye: %s", shorten(message.goodbye.reason))

    async def work(self) -> None:
        """Do tasks, one after the other, for ever."""
        while True:
            id_ = await self._queue.get()
            task = self._tasks.get(id_)
            if task is not None:
                await self._run_task_with_space(task)
                if id_ in self._outbox or self._tasks.get(id_) is task:  # else it was asked for anew
                    self._tasks.pop(id_, None)
                self._rested = time.monotonic()

    def idle_s(self) -> float:
        """Seconds since the last task; 0 while there is one."""
        return 0.0 if self._tasks else time.monotonic() - self._rested

    async def _take(self, task: pb.Task) -> None:
        size = task.blob.size if task.WhichOneof("body") == "blob" else len(task.inline)
        if task.id in self._outbox:
            self._errand(self._deliver(task.id))
        elif len(self._tasks) >= MAX_QUEUED or size > self._most_bytes:
            text = f"{len(self._tasks)} tasks wait here already, and this one has {size} bytes"
            await self._send_failure(task, LimitError(text))
        elif task.id not in self._tasks:
            self._tasks[task.id] = task
            self._queue.put_nowait(task.id)
            self._say(pb.AgentMessage(received=pb.Received(task=task.id)))

    async def _run_task_with_space(self, task: pb.Task) -> None:
        """One task to its end; while there is no room on the disk it is tried again, and the agent stays."""
        began = time.monotonic()
        for pause in pauses(random.Random()):
            try:
                return await self._run_task(task)
            except StorageError as error:
                self._status.record_failure(str(error))
                if time.monotonic() - began > STORAGE_PATIENCE_S:
                    return await self._send_failure(task, error)
                LOG.warning("%s of round %d waits: %s", task.kind, task.round, error)
            await asyncio.sleep(pause)
            if task.id not in self._tasks:
                return None
        raise AssertionError("pauses never end")

    async def _run_task(self, task: pb.Task) -> None:
        """One task to its end, or to the outbox; raises StorageError where that cannot be written."""
        self._status.working(task.kind, task.round)
        began, outcome = time.monotonic(), "ended"
        try:
            content = await self._content(task)
            described = await self._admission.admit(task, content)
            outcome = self._answer_again(task) or await self._execute(task, content, described)
        except PolicyError as refusal:
            outcome = "refused"
            await self._refuse(task, refusal)
        except StorageError:
            outcome = "waits"
            raise
        except FedPEFTError as error:
            outcome = "failed"
            await self._send_failure(task, error)
        finally:
            self._metrics.task(outcome, time.monotonic() - began)
            self._status.idle()

    async def _execute(self, task: pb.Task, content: bytes, described: str) -> str:
        """Carry a task out; what became of it, in one word."""
        key = _key(task)
        remembered = self._memory.get(key)
        before = remembered.for_task(task.id.hex())
        await self._admission.charge(task, described)
        self._at_work = task.id
        try:
            answer = await self._do_with_retry(self._order(task, content, described, before))
        finally:
            self._at_work = b""
        wanted = self._tasks.get(task.id)
        failed = answer.header["error"]
        if wanted is None or (wanted is not task and failed):
            return "withdrawn"  # as if it had never been begun; one that is asked for anew is begun anew
        self._status.base_digest = answer.header.get("base_digest", "") or self._status.base_digest
        self._status.loads += bool(answer.header.get("loaded", False))
        if failed:
            error = from_record(failed)
            if isinstance(error, PolicyError | StorageError):
                raise error
            await self._send_failure(task, error)
            return "failed"
        body, after = answer.parts["content"], answer.parts["memory"]
        facts = await asyncio.to_thread(contents, body)
        self._refuse_over_bytes(len(body))
        refuse(find_unwanted_metrics(self._trade.policy, facts.get("metrics", {})))
        self._admission.keep_rows(task, str(answer.header.get("rows", "")))
        if before or after or remembered.after:
            self._memory.put(key, Remembered(task.id.hex(), before, after, task.run))
        self._admission.keep_answer(task, body, after)
        self._send_out(task, body)
        return "done"

    def _answer_again(self, task: pb.Task) -> str:
        """Send the answer that a private round has had; what became of the task, empty without an answer."""
        answer = self._admission.get_answer(task)
        if answer is None:
            return ""
        self._refuse_over_bytes(len(answer.body))
        if answer.memory:
            remembered = self._memory.get(_key(task))
            before = remembered.for_task(remembered.task)
            self._memory.put(_key(task), Remembered(task.id.hex(), before, answer.memory, task.run))
        LOG.info("round %d was trained before; the same bytes are sent again", task.round)
        self._send_out(task, answer.body)
        return "done"

    def _refuse_over_bytes(self, more: int) -> None:
        refuse([over_bytes(self._trade.policy, self._book.today(_today()), more)])

    def _send_out(self, task: pb.Task, body: bytes) -> None:
        self._outbox.put(OutboxResult(_without_body(task), body))
        self._errand(self._deliver(task.id))

    async def _do_with_retry(self, order: Frame) -> Frame:
        """A worker that was killed from outside costs time, and no update: the order is given once more."""
        try:
            return await self._workshop.do(order)
        except WorkerKilledError as error:
            LOG.warning("%s, and does its task again", error)
        try:
            return await self._workshop.do(order)
        except WorkerKilledError as error:
            raise WorkerError(str(error)) from error

    def _order(self, task: pb.Task, content: bytes, described: str, memory: bytes) -> Frame:
        trade = self._trade
        header = {
            "app": trade.app,
            "kind": task.kind,
            "group": str(task.round),
            "run_digest": task.run_digest.hex(),
            "device_task": described,
            "client": trade.name,
            "data": str(trade.data),
            "model": trade.model,
            "device": trade.device,
            "files": dict(trade.files),
            "starts": str(self._starts),
            "replicas": str(self._replicas),
            "base_digests": list(trade.policy.base_digests or ()),
            "max_memory_mib": trade.policy.max_memory_mib,
            "rows": self._admission.rows_of(task),
            "metrics": trade.policy.metrics,
            "min_count": trade.policy.min_count,
            "min_rows": trade.policy.min_rows,
            "plugins": list(trade.policy.plugins),
        }
        return Frame(header, {"content": content, "memory": memory})

    # ---- What is refused, and what failed

    async def _refuse(self, task: pb.Task, refused: PolicyError) -> None:
        """The owner reads why; the server, which keys of the policy speak against the task."""
        reason = " ".join(str(refused).split())
        LOG.warning(
            "refused %s of round %d: %s", task.kind, task.round, reason, extra=_facts("refused", task)
        )
        self._begun.pop(task.id, None)
        self._book.usage.refusals += 1
        self._save_counts()
        self._status.record_refusal(reason)
        refusal = to_refusal(refused, self._trade.policy.tell_limits)
        refusal.task = task.id
        self._say(pb.AgentMessage(refusal=refusal))

    async def _send_failure(self, task: pb.Task, error: Exception) -> None:
        """An error is a result too, but none to keep: a task that comes again is done again.

        Its text, which may hold what is in a row, stays in the owner's log; the server gets its code.
        """
        line = to_text(error)
        LOG.warning("%s of round %d failed: %s", task.kind, task.round, line, extra=_facts("failed", task))
        self._book.usage.failures += 1
        try:
            self._admission.note_failure(task)
        except StorageError as full:
            LOG.warning("a failure is not in the privacy ledger: %s", full)
        self._save_counts()
        self._status.record_failure(line)
        self._say(pb.AgentMessage(result=pb.Result(task=task.id, failure=to_failure(error))))

    def _save_counts(self) -> None:
        """Write what is counted for people; what cannot be written now is written with the next change."""
        try:
            self._book.save()
        except StorageError as error:
            LOG.warning("counts are not written: %s", error)

    # ---- What travels

    async def _content(self, task: pb.Task) -> bytes:
        """The task's body; fetched over as many connections as it takes."""
        self._refuse_over_bytes(task.ByteSize() + task.blob.size)
        if task.WhichOneof("body") != "blob":
            self._count_bytes(down=len(task.inline))
            return bytes(task.inline)
        if (called := self._find_last_roll_call(task)) is not None:
            return called
        begun = self._begun.setdefault(task.id, bytearray())
        for pause in pauses(random.Random()):
            await self._linked.wait()
            link, had = self._link, len(begun)
            if link is None:
                continue
            self._refuse_over_bytes(task.blob.size - had)
            try:
                body = await link.pull(task.id, task.blob, begun)
            except (grpc.aio.AioRpcError, UpdateError, FederationError, TimeoutError) as error:
                if (
                    isinstance(error, grpc.aio.AioRpcError)
                    and error.code() == grpc.StatusCode.INVALID_ARGUMENT
                ):
                    self._begun.pop(task.id, None)
                    raise UpdateError(
                        "the server has withdrawn a task before its body was fetched"
                    ) from error
                await asyncio.sleep(pause)
            else:
                del self._begun[task.id]
                if task.round == 0:
                    self._greeting = (task.blob.digest, body)
                return body
            finally:
                self._count_bytes(down=max(0, len(begun) - had))
        raise AssertionError("pauses never end")

    def _find_last_roll_call(self, task: pb.Task) -> bytes | None:
        """The body of the last roll call, if this is the same: a run that waits calls every few seconds."""
        digest, body = self._greeting
        if task.round == 0 and digest == task.blob.digest:
            return body
        self._greeting = (b"", b"")
        return None

    async def _deliver(self, id_: bytes) -> None:
        """Send a result over the connection that is there; on the next one the server asks for it again."""
        link, finished = self._link, None if id_ in self._delivering else self._outbox.get(id_)
        if link is None or finished is None:
            return
        if over := over_bytes(self._trade.policy, self._book.today(_today()), len(finished.body)):
            if id_ not in self._held_back:  # whose upload a server has cut, or that comes from the day before
                LOG.warning("a result of round %d waits for tomorrow: %s", finished.task.round, over.text)
                self._held_back.add(id_)
                self._errand(self._deliver_tomorrow(id_, len(finished.body)))
            return
        self._delivering.add(id_)
        try:
            await self._send_result(link, finished)
        except UpdateError as error:  # it will never be wanted
            if id_ not in self._outbox:  # nor was it when this was said
                return
            LOG.warning("the result of round %d does not count: %s", finished.task.round, error)
            self._undo(finished.task)
        except (grpc.aio.AioRpcError, FedPEFTError, TimeoutError) as error:
            if self._link is link:
                LOG.info(
                    "a result of round %d is not through: %s", finished.task.round, error_of(error, "server")
                )
                self._errand(self._deliver_later(id_))
        finally:
            self._delivering.discard(id_)

    async def _deliver_tomorrow(self, id_: bytes, size: int) -> None:
        while over_bytes(self._trade.policy, self._book.today(_today()), size):
            await asyncio.sleep(_NEW_DAY_S)
        self._held_back.discard(id_)
        await self._deliver(id_)

    async def _deliver_later(self, id_: bytes) -> None:
        await asyncio.sleep(random.uniform(0.5, 2.0))
        await self._deliver(id_)

    async def _send_result(self, link: Session, finished: OutboxResult) -> None:
        task, body = finished.task, finished.body
        digest = await asyncio.to_thread(lambda: hashlib.sha256(body).digest())
        result = pb.Result(task=task.id, signature=self._signature(task, digest, len(body)))
        if len(body) <= link.welcome.max_inline_bytes:
            result.inline = body
        else:
            result.blob.CopyFrom(
                await link.push(task.id, body, digest, lambda sent: self._count_bytes(up=sent))
            )
        facts = await asyncio.to_thread(contents, body)
        crash_point("agent.result.sending")
        await link.send(pb.AgentMessage(result=result), facts | _facts("result", task))
        self._count_bytes(up=len(result.inline))

    def _signature(self, task: pb.Task, digest: bytes, size: int) -> bytes:
        if self._material is None:
            return b""
        header = UpdateHeader(task.run, task.run_digest.hex(), task.round, task.kind, self._trade.name)
        return sign_body_digest(self._material.key, header, digest, size)

    def _handle_ack(self, ack: pb.Ack) -> None:
        finished = self._outbox.get(ack.task) if ack.task in self._outbox else None
        if finished is None:
            return
        if ack.spare:
            LOG.info("the result of round %d is not needed: %s", finished.task.round, shorten(ack.reason))
            self._undo(finished.task)
            return
        if not ack.accepted:
            reason = shorten(ack.reason)
            LOG.warning("the result of round %d does not count: %s", finished.task.round, reason)
            self._status.record_failure(reason)
            self._undo(finished.task)
            return
        crash_point("agent.result.acknowledged")
        self._outbox.drop(ack.task)
        usage = self._book.usage
        usage.results += 1
        if (run := self._admission.usage_of(finished.task)) is not None and finished.task.round:
            run.rounds += finished.task.round != run.last_round
            run.last_round = finished.task.round
        self._save_counts()
        self._status.write_if_due(at_once=True)
        LOG.info(
            "%s of round %d: %d bytes accepted",
            finished.task.kind,
            finished.task.round,
            len(finished.body),
            extra=_facts("accepted", finished.task) | {"bytes_up": len(finished.body)},
        )

    def _handle_cancel(self, cancel: pb.Cancel) -> None:
        if cancel.task in self._tasks or cancel.task in self._outbox:
            LOG.info("a task was withdrawn: %s", shorten(cancel.reason))
        self._tasks.pop(cancel.task, None)
        self._begun.pop(cancel.task, None)
        if cancel.task == self._at_work:
            self._errand(self._workshop.interrupt())
        if cancel.task in self._outbox and (finished := self._outbox.get(cancel.task)) is not None:
            self._undo(finished.task)

    def _undo(self, task: pb.Task) -> None:
        """A result that does not count leaves no trace in the stages' memory."""
        self._outbox.drop(task.id)
        key = _key(task)
        remembered = self._memory.get(key)
        without = remembered.without(task.id.hex())
        if without is not remembered:
            self._memory.put(key, without)

    def _count_bytes(self, *, up: int = 0, down: int = 0) -> None:
        self._book.count_bytes(_today(), up=up, down=down)
        self._status.write_if_due()

    def _say(self, message: pb.AgentMessage) -> None:
        """Send if someone is there; whoever isn't asks again."""
        link = self._link
        if link is not None:
            self._errand(_quietly(lambda: link.send(message)))

    def _errand(self, work: Coroutine[Any, Any, None]) -> None:
        errand = asyncio.create_task(work)
        self._errands.add(errand)
        errand.add_done_callback(self._errands.discard)


async def _quietly(call: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """A message that does not get through is no error: the server asks again on the next connection."""
    try:
        await call()
    except (grpc.aio.AioRpcError, FederationError) as error:
        LOG.debug("not sent: %s", error)
    except StorageError as error:  # what can't be written down doesn't leave
        LOG.warning("not sent: %s", error)


def _without_body(task: pb.Task) -> pb.Task:
    bare = pb.Task()
    bare.CopyFrom(task)
    bare.ClearField("body")
    return bare


def _facts(event: str, task: pb.Task) -> dict[str, object]:
    """What a line of the log says to programs."""
    return {"event": event, "run": task.run, "round": task.round, "kind": task.kind}


def _key(task: pb.Task) -> str:
    """Return the key of what is remembered of a task's run; another run file is another run."""
    return run_key(task.run, task.run_digest.hex())


def _today() -> str:
    return datetime.now(UTC).date().isoformat()
