"""The service of people: runs submitted, listed, watched, stopped and pulled; agents listed and revoked."""

from __future__ import annotations

import asyncio
import tomllib
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fedpeft import __version__
from fedpeft.config import RunConfig
from fedpeft.credentials import Authority, Identity, Role, check_name
from fedpeft.credentials.federation import is_held
from fedpeft.errors import CredentialError, UsageError
from fedpeft.files import storage
from fedpeft.ledger.run_folder import ADAPTER, CHECKPOINTS, IDENTITY, REPORT, ROWS, RUN_FILE
from fedpeft.records import Round, parse_row
from fedpeft.runfile import build_run
from fedpeft.v1 import federation_pb2 as pb
from fedpeft.v1 import federation_pb2_grpc as rpc
from fedpeft_server.callers import Gate
from fedpeft_server.options import LONGEST_REQUEST
from fedpeft_server.sessions import AgentStatus, ServerStatus
from fedpeft_server.store import Rules, Store, StoredRun
from fedpeft_server.supervisor import Supervisor

FOLLOW_S = 0.3  # between two looks at a log that is followed
CHUNK = 256 * 1024
TOKEN_LIFE = timedelta(days=7)
PULLED = (IDENTITY, RUN_FILE, ROWS, ADAPTER, CHECKPOINTS, REPORT, "summary.json", "tensorboard")
Answer = TypeVar("Answer")


class AgentDesk(Protocol):
    """The transport's side of agents."""

    def agents(self) -> list[AgentStatus]:
        """All that were here since the start."""
        ...

    def standing(self) -> ServerStatus:
        """The transport as a whole."""
        ...

    def disconnect(self, agent: str, reason: str) -> None:
        """End an agent's session."""
        ...


@dataclass(frozen=True)
class Administration:
    """What the service stands on; the transport is known only once it listens.

    Attributes:
        authority: issues tokens and revokes; None where that is done elsewhere.
    """

    store: Store
    supervisor: Supervisor
    gate: Gate
    authority: Authority | None
    desk: Callable[[], AgentDesk]


class Admin(rpc.AdminServicer):
    """Every call names its least role; `Front` sends errors back with our one line."""

    def __init__(self, base: Administration) -> None:
        self._base = base

    async def SubmitRun(self, request: pb.SubmitRunRequest, context: Any) -> pb.RunInfo:  # noqa: N802  # the schema's
        """Queue a run."""

        def submit(who: Identity) -> pb.RunInfo:
            run = _run_of(request.run_toml)
            if not request.submission:
                raise UsageError("a submission without a name came; give each its own, such as a UUID")
            cohort = request.cohort
            rules = Rules(
                min_agents=cohort.min_agents,
                agents=tuple(map(check_name, cohort.agents)),
                wait_s=cohort.wait_s,
            )
            stored = self._base.supervisor.submit(
                run, rules, submission=request.submission[:128], submitter=who.name
            )
            return self._info(stored)

        return await self._answer(context, Role.SUBMITTER, submit)

    async def ListRuns(self, request: pb.ListRunsRequest, context: Any) -> pb.ListRunsReply:  # noqa: N802
        """The newest first."""

        def listed(_: Identity) -> pb.ListRunsReply:
            newest = list(reversed(self._base.supervisor.list()))
            some = newest[: request.limit] if request.limit else newest
            return pb.ListRunsReply(runs=[self._info(stored) for stored in some])

        return await self._answer(context, Role.SUBMITTER, listed)

    async def ShowRun(self, request: pb.RunRequest, context: Any) -> pb.RunInfo:  # noqa: N802
        """One run."""
        return await self._answer(
            context, Role.SUBMITTER, lambda _: self._info(self._base.supervisor.get(request.id))
        )

    async def StopRun(self, request: pb.StopRunRequest, context: Any) -> pb.RunInfo:  # noqa: N802
        """End a run."""

        def stop(who: Identity) -> pb.RunInfo:
            reason = " ".join(request.reason.split())[:500] or f"stopped by {who.name}"
            return self._info(self._base.supervisor.stop(request.id, reason))

        return await self._answer(context, Role.SUBMITTER, stop)

    async def Logs(self, request: pb.LogsRequest, context: Any) -> AsyncIterator[pb.LogLine]:  # noqa: N802
        """Lines so far; when followed, until the run has ended."""
        after = request.after
        while True:

            def more(_: Identity, since: int = after) -> tuple[bool, list[pb.LogLine]]:
                # Asked before the lines are read: what is written between the two is not lost.
                ended = self._base.supervisor.get(request.id).status.final
                lines = self._base.store.runs.lines(request.id, after=since)
                return ended, [
                    pb.LogLine(number=line.number, time_ms=_ms(line.at), json=line.text) for line in lines
                ]

            ended, lines = await self._answer(context, Role.SUBMITTER, more)
            for line in lines:
                yield line
                after = line.number
            if not lines and (ended or not request.follow):
                return
            if not lines:
                await asyncio.sleep(FOLLOW_S)

    async def PullResult(  # noqa: N802
        self, request: pb.PullResultRequest, context: Any
    ) -> AsyncIterator[pb.ResultChunk]:
        """The files of a run that has ended; of one that goes on, those of its last committed round."""
        with ExitStack() as stack:

            def files(_: Identity) -> tuple[pb.Unfinished | None, list[tuple[str, Path]]]:
                folder, unfinished = self._result(request.id, stack)
                return unfinished, [(path.relative_to(folder).as_posix(), path) for path in _pulled(folder)]

            unfinished, found = await self._answer(context, Role.SUBMITTER, files)
            for name, path in found:
                chunks = _chunks(name, path)

                def following(_: Identity, left: Iterator[pb.ResultChunk] = chunks) -> pb.ResultChunk | None:
                    return next(left, None)

                while chunk := await self._answer(context, Role.SUBMITTER, following):
                    if unfinished is not None:
                        chunk.unfinished.CopyFrom(unfinished)
                    yield chunk

    def _result(self, run_id: str, stack: ExitStack) -> tuple[Path, pb.Unfinished | None]:
        """A run's folder, or one with what it has reached, which goes with the stack."""
        store, supervisor = self._base.store, self._base.supervisor
        stored = supervisor.get(run_id)
        if stored.status.final:
            return store.run_folder(stored.id), None
        folder = stack.enter_context(store.scratch()) / "run"
        reached = supervisor.snapshot(run_id, folder)
        return folder, pb.Unfinished(round=reached, rounds=stored.run.run.rounds)

    async def ListAgents(self, request: pb.ListAgentsRequest, context: Any) -> pb.ListAgentsReply:  # noqa: N802
        """Those that are here and those that were."""

        def listed(_: Identity) -> pb.ListAgentsReply:
            now = {status.name: _agent_info(status) for status in self._base.desk().agents()}
            for sighting in self._base.store.agents.list():
                if sighting.name not in now:
                    now[sighting.name] = pb.AgentInfo(
                        name=sighting.name, last_seen_ms=_ms(sighting.last_seen)
                    )
            authority = self._base.authority  # without it a server knows serial numbers, and no names
            for name in authority.revoked(datetime.now(UTC)) if authority is not None else ():
                if name in now:
                    now[name].revoked = True
            agents = [now[name] for name in sorted(now)]
            return pb.ListAgentsReply(agents=agents, server=_server_info(self._base.desk().standing()))

        return await self._answer(context, Role.SUBMITTER, listed)

    async def IssueToken(self, request: pb.IssueTokenRequest, context: Any) -> pb.IssueTokenReply:  # noqa: N802
        """A one-time token for a device or a person."""

        def issue(_: Identity) -> pb.IssueTokenReply:
            authority = self._authority()
            try:
                role = Role(request.role or Role.AGENT)
            except ValueError as error:
                raise UsageError(
                    f"no role is called {request.role[:20]!r}; use one of {', '.join(Role)}"
                ) from error
            now = datetime.now(UTC)
            life = timedelta(seconds=request.valid_s) if request.valid_s else TOKEN_LIFE
            if is_held(authority, request.name, now):
                raise CredentialError(
                    f"{request.name!r} is there already; give another name, or revoke that one first"
                )
            text = authority.tokens.invite(Identity(request.name, role), now, life)
            return pb.IssueTokenReply(token=text, expires_ms=_ms((now + life).timestamp()))

        return await self._answer(context, Role.ADMIN, issue)

    async def RevokeAgent(self, request: pb.RevokeAgentRequest, context: Any) -> pb.RevokeAgentReply:  # noqa: N802
        """End what a name may do, at once."""

        def revoke(_: Identity) -> pb.RevokeAgentReply:
            count = self._authority().revoke(check_name(request.name), datetime.now(UTC))
            self._base.desk().disconnect(request.name, "its certificate was revoked")
            return pb.RevokeAgentReply(revoked=count > 0)

        return await self._answer(context, Role.ADMIN, revoke)

    async def _answer(self, context: Any, role: Role, work: Callable[[Identity], Answer]) -> Answer:
        """Check the caller's role and do the work on a thread; errors are the front door's."""
        return await asyncio.to_thread(work, self._base.gate.require(context, role))

    def _authority(self) -> Authority:
        if self._base.authority is None:
            raise UsageError(
                "this server does not issue certificates; use fedpeft provision where the authority is"
            )
        return self._base.authority

    def _info(self, stored: StoredRun) -> pb.RunInfo:
        last = _last_round(self._base.store, stored)
        info = pb.RunInfo(
            id=stored.id,
            name=stored.run.run.name,
            digest=stored.digest,
            status=stored.status,
            detail=stored.reason,
            round=max(0, stored.round),
            rounds=stored.run.run.rounds,
            agents=self._agents(stored),
            submitted_ms=_ms(stored.submitted_at),
            updated_ms=_ms(stored.changed_at),
            metrics=_metrics(last),
            adapter_digest=stored.adapter_digest,
        )
        epsilon = getattr(last, "epsilon", None)
        if epsilon is not None:
            info.epsilon = epsilon
        return info

    def _agents(self, stored: StoredRun) -> list[str]:
        roster = self._base.store.runs.roster(stored.id)
        return [] if roster is None else roster.names


def _run_of(text: str) -> RunConfig:
    if len(text.encode()) > LONGEST_REQUEST:
        raise UsageError(f"the run file has more than {LONGEST_REQUEST} bytes; it is no run file")
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"the run file is not TOML: {error}") from error
    return build_run(table, source="run file")


def _last_round(store: Store, stored: StoredRun) -> Round | None:
    text = store.rounds(stored).last_row()
    row = None if text is None else parse_row(text)
    return row if isinstance(row, Round) else None


def _metrics(last: Round | None) -> dict[str, float]:
    if last is None or last.evaluation is None:
        return {}
    return {name: score.value for name, score in last.evaluation.scores.items()}


def _agent_info(status: AgentStatus) -> pb.AgentInfo:
    return pb.AgentInfo(
        name=status.name,
        connected=status.connected,
        address=status.address,
        last_seen_ms=_ms(status.last_seen),
        capabilities=status.capabilities,
        results=status.results,
        refusals=status.refusals,
        last_refusal=status.last_refusal,
        refused=status.refused,
        calls=status.calls,
        bytes_up=status.bytes_up,
        bytes_down=status.bytes_down,
        certificate_ends_ms=_ms(status.certificate_ends or 0.0),
    )


def _server_info(status: ServerStatus) -> pb.ServerInfo:
    return pb.ServerInfo(
        version=__version__,
        started_ms=_ms(status.started),
        certificate_ends_ms=_ms(status.certificate_ends or 0.0),
        connected=status.connected,
        max_agents=status.max_agents,
        refused=status.refused,
        refused_nameless=status.refused_nameless,
    )


def _pulled(folder: Path) -> Iterator[Path]:
    """The files that people get, whole ones only."""
    for name in PULLED:
        place = folder / name
        found = sorted(place.rglob("*")) if place.is_dir() else [place]
        yield from (path for path in found if path.is_file() and ".partial-" not in path.as_posix())


def _chunks(name: str, path: Path) -> Iterator[pb.ResultChunk]:
    with storage(path):
        size, offset = path.stat().st_size, 0
        with path.open("rb") as file:
            while offset < size or offset == 0:
                data = file.read(CHUNK)
                yield pb.ResultChunk(path=name, offset=offset, size=size, data=data, crc32=zlib.crc32(data))
                offset += len(data)
                if not data:
                    return


def _ms(seconds: float) -> int:
    return round(1000 * seconds)
