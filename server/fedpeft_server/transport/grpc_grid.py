"""`GrpcGrid`: Flower's `Grid` over connected agents, for one run and one thread."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Message, RecordDict

from fedpeft.errors import FederationError, FedPEFTError, UpdateError
from fedpeft.transport.node_identity import ensure_identity
from fedpeft.transport.polled_grid import PolledGrid
from fedpeft.transport.record_bytes import content_bytes, content_of
from fedpeft.transport.tasks import HELLO, error_reply, read_hello
from fedpeft.v1 import federation_pb2 as pb
from fedpeft_server.store.contracts import Acceptor, BlobStore, ReceivedResult
from fedpeft_server.transport.refusals import Reason
from fedpeft_server.transport.sessions import Hub
from fedpeft_server.transport.work import DurableResult, Failed, Outcome, TaskBody, Work, work_id

WAIT_S = 0.25  # how long `pull_messages` waits for the first reply; bounds how late a deadline is noticed


@functools.lru_cache(maxsize=16_384)
def node_id(agent: str) -> int:
    """An agent's number: from its name alone, so that it is the same after a restart of either side."""
    return (int.from_bytes(hashlib.sha256(agent.encode()).digest()[:8], "little") >> 1) | 2


@dataclass(frozen=True)
class RunIdentity:
    """A run as the transport knows it.

    Attributes:
        id: the server's name for it.
        digest: of what its agents are told of it (`fedpeft.config.device_task`), hex.
        overlap: rounds whose work goes on when that of a later one is asked for.
    """

    id: str
    digest: str
    overlap: int = 0


class GrpcGrid(PolledGrid):
    """One run's view of the agents.

    Replies are given out once they are durable. A message to an agent that is away waits for it, and is
    pushed again to one that comes back; a reply that was accepted before a restart is there at once. Messages
    of older rounds that nobody has answered are withdrawn when those of a new round are pushed, but for the
    run's overlap.

    Args:
        agents: who may take part; None: every agent.
        max_result_bytes: of one reply; larger ones are refused.
        wait_s: how long `pull_messages` waits for the first reply.
    """

    def __init__(
        self,
        run: RunIdentity,
        hub: Hub,
        loop: asyncio.AbstractEventLoop,
        acceptor: Acceptor,
        blobs: BlobStore,
        *,
        agents: Collection[str] | None = None,
        max_result_bytes: int,
        wait_s: float = WAIT_S,
    ) -> None:
        ensure_identity()
        self._wait_s = wait_s
        self._run, self._hub, self._loop = run, hub, loop
        self._acceptor, self._blobs = acceptor, blobs
        self._allowed = None if agents is None else frozenset(agents)
        self._max_result_bytes = max_result_bytes
        self._names: dict[int, str] = {}
        self._count = 0
        self._content: tuple[RecordDict, TaskBody] | None = None
        self._changed = threading.Condition()
        self._waiting: dict[str, tuple[Message, Work]] = {}  # by message id
        self._ready: dict[str, Outcome] = {}
        self._ids: dict[bytes, str] = {}  # of work under way, to its message
        self._stopped: FedPEFTError | None = None

    @property
    def agents_here(self) -> list[str]:
        """Names of agents that are here now and may take part, sorted."""
        here = self._hub.connected
        return sorted(here if self._allowed is None else here & self._allowed)

    def away_s(self, node: int) -> tuple[str, float] | None:
        """An agent's name and how long it has been away, since the server started at most; None: here."""
        name = self._names.get(node, "")
        away_s = self._hub.away_s(name)
        return None if away_s is None else (name, away_s)

    def know(self, agents: Iterable[str]) -> None:
        """Make agents addressable by `node_id` that are not connected, such as those of a stored roster."""
        for agent in agents:
            self._names[node_id(agent)] = agent

    def set_result_limit(self, result_bytes: int) -> None:
        """Refuse replies that are larger, from the next messages on; the grid's own bound stays one."""
        self._max_result_bytes = min(self._max_result_bytes, result_bytes)

    def get_node_ids(self) -> Iterable[int]:
        """Numbers of the agents in `connected`."""
        names = self.agents_here
        self.know(names)
        return [node_id(name) for name in names]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send; returns ids.

        Raises:
            FederationError: an unknown node, or the grid was stopped.
            UpdateError: a content that cannot be sent.
            StateError, StorageError: what was accepted before cannot be read.
        """
        works = [(message, self._work(message)) for message in messages]
        recalled = self._recall([work for _, work in works])
        fresh: list[Work] = []
        ids = []
        with self._changed:
            self._refuse_if_stopped()
            stale = self._stale({work.round for _, work in works})
            for message, work in works:
                self._count += 1
                ids.append(str(self._count))
                self._waiting[ids[-1]] = (message, work)
                arrival = recalled.get(work.id)
                if arrival is not None:
                    self._ready[ids[-1]] = DurableResult(arrival.digest, arrival.size, arrival.body)
                else:
                    self._ids[work.id] = ids[-1]
                    fresh.append(work)
        self._withdraw(stale, "its round is over")
        self._loop.call_soon_threadsafe(self._hub.offer, fresh)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that are ready, in the order in which they came; waits a moment for the first.

        Raises:
            FedPEFTError: what the grid was stopped with.
        """
        wanted = set(message_ids)
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not wanted.isdisjoint(self._ready), self._wait_s)
            self._refuse_if_stopped()
            ready = [id_ for id_ in self._ready if id_ in wanted]
            taken = [(*self._waiting.pop(id_), self._ready.pop(id_)) for id_ in ready]
        # One at a time, as the caller takes them: blobs are read when their turn comes.
        return (self._reply(message, work, outcome) for message, work, outcome in taken)

    def cancel(self, message_ids: Iterable[str]) -> None:
        """Forget messages and tell their agents; replies that are there already go too."""
        with self._changed:
            works = [self._forget(id_) for id_ in message_ids if id_ in self._waiting]
        self._withdraw(works, "nobody waits for it any more")

    def free_place(self, round_: int, client: str) -> None:
        """An answer does not count: those whose answers wait for a place are asked for them again."""
        self._acceptor.free_place(self._run.id, round_, client)
        self._loop.call_soon_threadsafe(self._hub.retry_deferred, self._run.id)

    def tell(self, agent: str, text: str) -> None:
        """From any thread: say something to an agent's owner, if the agent is here."""
        notice = pb.ServerMessage(notice=pb.Notice(run=self._run.id, text=text[:4096]))
        self._loop.call_soon_threadsafe(self._hub.tell, agent, notice)

    def count_refusal(self, agent: str, why: str) -> None:
        """From any thread: count a reply that must not be folded in, with its sender."""
        self._loop.call_soon_threadsafe(self._hub.shares.count, agent, Reason.UPDATE, why)

    def stop(self, error: FedPEFTError) -> None:
        """From any thread: let whoever waits, now or later, raise `error`; withdraw all work."""
        with self._changed:
            self._stopped = error
            works = [self._forget(id_) for id_ in list(self._waiting)]
            self._changed.notify_all()
        self._withdraw(works, "the run was stopped")

    def deliver(self, work: Work, outcome: Outcome) -> None:
        """On the event loop: an outcome of work of this grid."""
        with self._changed:
            id_ = self._ids.pop(work.id, None)
            if id_ is not None and id_ in self._waiting:
                self._ready[id_] = outcome
                self._changed.notify_all()

    def _work(self, message: Message) -> Work:
        meta = message.metadata
        agent = self._names.get(meta.dst_node_id)
        if agent is None:
            raise FederationError(f"node {meta.dst_node_id} is no agent of this run; ask get_node_ids first")
        body, round_ = self._body(message.content), int(meta.group_id or 0)
        return Work(
            id=work_id(self._run.id, round_, meta.message_type, agent, body),
            run=self._run.id,
            run_digest=self._run.digest,
            round=round_,
            kind=meta.message_type,
            agent=agent,
            body=body,
            owner=self,
            max_result_bytes=self._max_result_bytes,
        )

    def _body(self, content: RecordDict) -> TaskBody:
        """Serialised once for all messages that share a content object."""
        if self._content is None or self._content[0] is not content:
            self._content = (content, TaskBody.of(content_bytes(content)))
        return self._content[1]

    def _recall(self, works: Sequence[Work]) -> Mapping[bytes, ReceivedResult]:
        """What was accepted before, by work.

        Where rounds overlap, an old task's state travels whole after a restart, however it did before, and
        the task has another id then. Its agent's result of that round is the one that there is.
        """
        mine = {(work.round, work.kind, work.agent): work.id for work in works}
        found: dict[bytes, ReceivedResult] = {}
        for round_, kind in {(work.round, work.kind) for work in works}:
            for arrival in self._acceptor.recall(self._run.id, round_, kind):
                id_ = mine.get((round_, kind, arrival.agent))
                if id_ is not None and (self._run.overlap or arrival.task == id_):
                    found[id_] = arrival
        return found

    def _stale(self, rounds: set[int]) -> list[Work]:
        """Forget work of rounds too far before the ones that are pushed now."""
        first = min(rounds, default=0) - self._run.overlap
        return [self._forget(id_) for id_, (_, work) in list(self._waiting.items()) if work.round < first]

    def _forget(self, id_: str) -> Work:
        _, work = self._waiting.pop(id_)
        self._ready.pop(id_, None)
        self._ids.pop(work.id, None)
        return work

    def _reply(self, message: Message, work: Work, outcome: Outcome) -> Message:
        if isinstance(outcome, Failed):
            return error_reply(outcome.error, message)
        try:
            reply = Message(self._content_of(work, outcome), reply_to=message)
            if work.kind == HELLO and read_hello(reply).client != work.agent:
                raise UpdateError(
                    f"{work.agent}: an agent answered the roll call under another name than its own"
                )
        except FedPEFTError as error:
            if isinstance(error, UpdateError):
                self.count_refusal(work.agent, str(error))
            return error_reply(error, message)
        return reply

    def _content_of(self, work: Work, done: DurableResult) -> RecordDict:
        if done.body is not None:
            return content_of(done.body, who=work.agent)
        with self._blobs.reading(done.digest) as body:
            return content_of(body, who=work.agent)

    def _refuse_if_stopped(self) -> None:
        if self._stopped is not None:
            raise self._stopped

    def _withdraw(self, works: list[Work], reason: str) -> None:
        if works:
            self._loop.call_soon_threadsafe(self._hub.withdraw, works, reason)
