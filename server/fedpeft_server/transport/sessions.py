"""Agents and their connections: who is there, what they have been asked, what waits to be sent.

Everything here runs on the event loop unless it says otherwise.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from fedpeft.errors import FedPEFTError, UpdateError
from fedpeft.v1 import federation_pb2 as pb
from fedpeft.wire.failures import from_message
from fedpeft_server.transport.callers import Caller
from fedpeft_server.transport.rate_limits import RateLimits
from fedpeft_server.transport.refusals import Reason
from fedpeft_server.transport.work import Failed, Outcome, TaskBody, Work

LOG = logging.getLogger("fedpeft.server")
_RETRY_MS = 1000  # after which an agent that was sent away dials again
MAX_NOTES = 1024  # small messages that wait for a peer to read; there is one per task at most, and heartbeats
MAX_WITHDRAWN = 64  # tasks of an agent that are remembered as no longer wanted
MAX_ANNOUNCED = 2  # blobs for one task: the result, and once more if the agent crashed and did it again


class Connection:
    """One open session. What waits to be sent are references to bodies that all agents share, so it is small.

    Attributes:
        session: counts the connections since the server started.
        heard_s: when the agent said something last, on the monotonic clock.
    """

    def __init__(self, caller: Caller, address: str, session: int, max_inline_bytes: int) -> None:
        self.caller, self.address, self.session = caller, address, session
        self.heard_s = time.monotonic()
        self._max_inline_bytes = max_inline_bytes
        self._waiting: OrderedDict[bytes, Work] = OrderedDict()
        self._notes: deque[pb.ServerMessage] = deque()
        self._something = asyncio.Event()
        self._goodbye: pb.ServerMessage | None = None

    def push(self, work: Work) -> None:
        """Send a task when its turn comes."""
        self._waiting[work.id] = work
        self._something.set()

    def tell(self, message: pb.ServerMessage) -> None:
        """Send a small message before any task; a peer that lets too many wait doesn't read and has to go."""
        if len(self._notes) >= MAX_NOTES:
            self._notes.clear()
            self.close("too many messages wait here to be read")
        self._notes.append(message)
        self._something.set()

    def withdraw(self, task: bytes, reason: str) -> None:
        """Don't send a task, or say that it is no longer wanted."""
        if self._waiting.pop(task, None) is None:
            self.tell(pb.ServerMessage(cancel=pb.Cancel(task=task, reason=reason)))

    @property
    def closed(self) -> bool:
        """Whether the server has ended it."""
        return self._goodbye is not None

    def close(self, reason: str) -> None:
        """End the session; the reason is what the agent is told, last of all."""
        if self._goodbye is None:
            self._goodbye = pb.ServerMessage(goodbye=pb.Goodbye(reason=reason, retry_ms=_RETRY_MS))
            self._something.set()

    async def next_message(self) -> pb.ServerMessage:
        """What to send next; waits for it. After a goodbye there is nothing more."""
        while True:
            if self._goodbye is not None:
                return self._goodbye
            if self._notes:
                return self._notes.popleft()
            if self._waiting:
                _, work = self._waiting.popitem(last=False)
                return work.message(self._max_inline_bytes)
            self._something.clear()
            await self._something.wait()


@dataclass
class AgentRecord:
    """What is known of one agent while the server runs.

    Attributes:
        pending: work without an outcome, in the order in which it was asked; a new connection gets it again.
        announced: digests of the blobs that were announced for pending work.
        queued: pending work whose result is being stored.
        spare: pending work whose result came, and found no place in its round.
        withdrawn: tasks that were no longer wanted, the last ones: their results are late and nothing worse.
    """

    name: str
    connection: Connection | None = None
    pending: OrderedDict[bytes, Work] = field(default_factory=OrderedDict)
    announced: dict[bytes, set[bytes]] = field(default_factory=dict)
    queued: set[bytes] = field(default_factory=set)
    spare: dict[bytes, Work] = field(default_factory=dict)
    withdrawn: deque[bytes] = field(default_factory=lambda: deque(maxlen=MAX_WITHDRAWN))
    certificate_ends: datetime | None = None
    capabilities: Mapping[str, str] = field(default_factory=dict)
    address: str = ""
    last_seen: float = 0.0
    sessions: int = 0
    results: int = 0
    refusals: int = 0
    last_refusal: str = ""


@dataclass(frozen=True)
class AgentStatus:
    """One agent as people and rules see it; times are seconds since 1970.

    Attributes:
        refusals: of the server by the agent's owner.
        refused: of the agent by the server, by reason.
        calls, bytes_up, bytes_down: since the server started.
        certificate_ends: None without TLS.
    """

    name: str
    connected: bool
    address: str
    last_seen: float
    sessions: int
    results: int
    refusals: int
    last_refusal: str
    capabilities: Mapping[str, str]
    refused: Mapping[str, int]
    calls: int
    bytes_up: int
    bytes_down: int
    certificate_ends: float | None


@dataclass(frozen=True)
class ServerStatus:
    """The transport as people see it; times are seconds since 1970.

    Attributes:
        certificate_ends: None without TLS.
        refused: of everyone, by reason.
        refused_nameless: of these, what callers without a name of their own were refused.
    """

    started: float
    certificate_ends: float | None
    connected: int
    max_agents: int
    refused: Mapping[str, int]
    refused_nameless: Mapping[str, int]


class Hub:
    """All agents. Work waits here for agents that are away."""

    def __init__(self, max_inline_bytes: int, shares: RateLimits) -> None:
        self.max_inline_bytes, self.shares = max_inline_bytes, shares
        self._agents: dict[str, AgentRecord] = {}
        self._sessions = 0
        self._began_s, self._left_s = time.monotonic(), dict[str, float]()
        self.connected: frozenset[str] = frozenset()  # replaced, never changed: any thread may read it
        self.freed = 0  # how often a place became free; any thread may read it

    def open(self, caller: Caller, address: str, hello: pb.Hello) -> Connection:
        """A new connection of an agent; an older one of the same name ends. Pending work is pushed again."""
        agent = self._agents.setdefault(caller.name, AgentRecord(caller.name))
        if agent.connection is not None:
            agent.connection.close("another connection of the same agent took its place")
        self._sessions += 1
        connection = Connection(caller, address, self._sessions, self.max_inline_bytes)
        agent.connection, agent.address = connection, address
        agent.sessions += 1
        agent.capabilities = dict(hello.capabilities)
        agent.certificate_ends = caller.certificate_ends
        agent.last_seen = time.time()
        for work in agent.pending.values():
            connection.push(work)
        self.connected = self.connected | {caller.name}
        LOG.info("%s connected", caller.name, extra=_facts("connected", connection))
        return connection

    def remind(self, connection: Connection) -> None:
        """Say again what is no longer wanted, after the welcome: the agent may have been away."""
        for task in self._agents[connection.caller.name].withdrawn:
            connection.withdraw(task, "nobody waits for it any more")

    def close_connection(self, connection: Connection) -> None:
        """A connection has ended; its work stays pending."""
        agent = self._agents[connection.caller.name]
        agent.last_seen = time.time()
        if agent.connection is connection:
            agent.connection = None
            self._left_s[agent.name] = time.monotonic()
            self.connected = self.connected - {agent.name}
            LOG.info("%s left", agent.name, extra=_facts("left", connection))

    def connection(self, name: str) -> Connection | None:
        """An agent's open session; None: it is away."""
        agent = self._agents.get(name)
        return None if agent is None else agent.connection

    def record_seen(self, connection: Connection) -> None:
        """The agent said something."""
        connection.heard_s = time.monotonic()
        self._agents[connection.caller.name].last_seen = time.time()

    def away_s(self, name: str) -> float | None:
        """How long an agent has been away, at most since the server started; None: it is here. Any thread."""
        if name in self.connected:
            return None
        return time.monotonic() - self._left_s.get(name, self._began_s)

    def offer(self, works: Iterable[Work]) -> None:
        """Push work, now or when its agent connects."""
        for work in works:
            agent = self._agents.setdefault(work.agent, AgentRecord(work.agent))
            agent.pending[work.id] = work
            if work.id in agent.withdrawn:
                agent.withdrawn.remove(work.id)
            if agent.connection is not None:
                agent.connection.push(work)

    def withdraw(self, works: Iterable[Work], reason: str) -> None:
        """Work that is no longer wanted."""
        for work in works:
            agent = self._agents.get(work.agent)
            if agent is not None and agent.pending.get(work.id) is work:
                if work.id in agent.spare:
                    self.shares.count(agent.name, Reason.SPARE, reason)
                agent.withdrawn.append(work.id)
                _finish_work(agent, work)
                if agent.connection is not None:
                    agent.connection.withdraw(work.id, reason)

    def count_pending(self) -> int:
        """Tasks without an outcome; on any thread, which may miss one that comes or goes meanwhile."""
        return sum(len(agent.pending) for agent in list(self._agents.values()))

    def pending(self, name: str, task: bytes) -> Work | None:
        """The work that an agent's result answers; None if nobody waits for it."""
        agent = self._agents.get(name)
        return None if agent is None else agent.pending.get(task)

    def announce(self, work: Work, digest: bytes) -> bool:
        """Whether one more blob may be sent for work that is pending; the same one any number of times."""
        announced = self._agents[work.agent].announced.setdefault(work.id, set())
        if digest not in announced and len(announced) >= MAX_ANNOUNCED:
            return False
        announced.add(digest)
        return True

    def queue(self, work: Work) -> bool:
        """Whether a result of pending work may be stored now: no other one is being."""
        queued = self._agents[work.agent].queued
        if work.id in queued:
            return False
        queued.add(work.id)
        return True

    def reason_unwanted(self, name: str, task: bytes) -> Reason:
        """What an agent's part in a task counts as that isn't pending: late, or never asked for."""
        agent = self._agents.get(name)
        late = agent is not None and task in agent.withdrawn
        return Reason.SPARE if late else Reason.NOT_ASKED

    def defer(self, work: Work, freed: int) -> bool:
        """Put a result off that found no place; its agent keeps it. False: nobody waits for it any more.

        Args:
            freed: as it was before the result was judged; if a place has become free since, it is asked for
                again at once.
        """
        agent = self._agents[work.agent]
        if agent.pending.get(work.id) is not work:
            return False
        agent.queued.discard(work.id)
        if freed == self.freed:
            agent.spare[work.id] = work
        elif agent.connection is not None:
            agent.connection.push(work)
        return True

    def retry_deferred(self, run: str) -> None:
        """A place is free: ask again for all results of the run that were put off."""
        self.freed += 1
        for agent in self._agents.values():
            for work in [work for work in agent.spare.values() if work.run == run]:
                del agent.spare[work.id]
                if agent.connection is not None:
                    agent.connection.push(work)

    def settle(self, work: Work, outcome: Outcome) -> None:
        """Hand an outcome to whoever asked, once."""
        agent = self._agents[work.agent]
        if agent.pending.get(work.id) is not work:
            return
        _finish_work(agent, work)
        agent.results += not isinstance(outcome, Failed)
        work.owner.deliver(work, outcome)

    def record_refusal(self, name: str, refusal: pb.Refusal) -> None:
        """The agent's owner does not want a task done."""
        agent, work = self._agents[name], self.pending(name, refusal.task)
        error = self.reason_of(name, refusal)
        agent.refusals += 1
        agent.last_refusal = str(error)
        if work is not None:
            self.settle(work, Failed(error))

    def reason_of(self, name: str, message: pb.Failure | pb.Refusal) -> FedPEFTError:
        """Why an agent does not do a task, in our words; one that gives no reason of the list is counted."""
        try:
            return from_message(message, name)
        except UpdateError as error:
            self.shares.count(name, Reason.MALFORMED, str(error))
            return error

    def body(self, name: str, task: bytes, digest: bytes) -> TaskBody | None:
        """A body that the agent may fetch: that of a task of its own."""
        work = self.pending(name, task)
        return work.body if work is not None and work.body.digest == digest else None

    def tell(self, name: str, message: pb.ServerMessage) -> None:
        """A small message to an agent, if it is there."""
        agent = self._agents.get(name)
        if agent is not None and agent.connection is not None:
            agent.connection.tell(message)

    def close(self, reason: str, name: str | None = None) -> None:
        """End the session of one agent, or of all."""
        for agent in self._agents.values():
            if agent.connection is not None and name in (None, agent.name):
                agent.connection.close(reason)

    def status(self) -> list[AgentStatus]:
        """All agents that were ever here, by name."""
        return [
            AgentStatus(
                name=agent.name,
                connected=agent.connection is not None,
                address=agent.address,
                last_seen=agent.last_seen,
                sessions=agent.sessions,
                results=agent.results,
                refusals=agent.refusals,
                last_refusal=agent.last_refusal,
                capabilities=agent.capabilities,
                refused=self.shares.book.of(agent.name),
                certificate_ends=agent.certificate_ends.timestamp() if agent.certificate_ends else None,
                **self.shares.get_usage(agent.name),
            )
            for _, agent in sorted(self._agents.items())
            if agent.sessions
        ]


def _facts(event: str, connection: Connection) -> dict[str, object]:
    return {"event": event, "agent": connection.caller.name, "session": connection.session}


def _finish_work(agent: AgentRecord, work: Work) -> None:
    del agent.pending[work.id]
    agent.spare.pop(work.id, None)
    agent.announced.pop(work.id, None)
    agent.queued.discard(work.id)
