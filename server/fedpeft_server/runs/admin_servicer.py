"""The service of people: runs submitted, listed, watched, stopped and pulled; agents listed and revoked.

Every call asks whose the run is; see `ownership`. What is done is in the audit log before it is done.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fedpeft.credentials import Authority, Identity, Role, check_name
from fedpeft.credentials.federation import is_held
from fedpeft.errors import CredentialError, LimitError, UsageError
from fedpeft.v1 import federation_pb2 as pb
from fedpeft.v1 import federation_pb2_grpc as rpc
from fedpeft_server.runs.access_log import AccessLog
from fedpeft_server.runs.admin_messages import (
    agent_info,
    incomplete_members,
    list_pullable_files,
    milliseconds,
    outline_agent,
    outline_server,
    result_chunks,
    run_info,
    run_of,
    server_info,
)
from fedpeft_server.runs.ownership import require_owner, require_reader
from fedpeft_server.runs.supervisor import Supervisor
from fedpeft_server.store import EVERYONE, Rules, Store, StoredRun
from fedpeft_server.store.audit_log import Action, Actor
from fedpeft_server.transport.callers import Gate
from fedpeft_server.transport.fair_queue import FairQueue
from fedpeft_server.transport.refusals import Reason, Refused
from fedpeft_server.transport.sessions import AgentStatus, ServerStatus

FOLLOW_S = 0.3  # between two looks at a log that is followed
LONG_CALLS = 3  # at a time, of those that a run file or a run may hold up; one of each caller
TOKEN_LIFE = timedelta(days=7)
_READERS = 1000  # of a run
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
    """Every call names its least role; `RequestGuard` sends errors back with our one line."""

    def __init__(self, base: Administration) -> None:
        self._base = base
        self._access = AccessLog(base.store.audit)
        self._turns = FairQueue(LONG_CALLS, math.inf)
        self._long = ThreadPoolExecutor(LONG_CALLS, thread_name_prefix="fedpeft-long")

    async def SubmitRun(self, request: pb.SubmitRunRequest, context: Any) -> pb.RunInfo:  # noqa: N802  # the schema's
        """Queue a run."""

        def submit(who: Identity) -> pb.RunInfo:
            run = run_of(request.run_toml)
            if not request.submission:
                raise UsageError("a submission without a name came; give each its own, such as a UUID")
            cohort = request.cohort
            rules = Rules(
                min_agents=cohort.min_agents,
                agents=tuple(map(check_name, cohort.agents)),
                wait_s=cohort.wait_s,
            )
            try:
                stored = self._base.supervisor.submit(
                    run,
                    rules,
                    submission=request.submission,
                    submitter=who.name,
                    role=who.role,
                    readers=_readers_of(request),
                )
            except LimitError as error:
                self._access.refuse(who, "", "SubmitRun")
                raise Refused(Reason.QUOTA, error) from error
            return self._info(stored)

        return await self._answer_long(context, Role.SUBMITTER, submit)

    async def ListRuns(self, request: pb.ListRunsRequest, context: Any) -> pb.ListRunsReply:  # noqa: N802
        """Those that the caller may read, the newest first."""

        def listed(who: Identity) -> pb.ListRunsReply:
            reader = None if who.role is Role.ADMIN else who.name
            some = self._base.supervisor.list(reader=reader, limit=request.limit)
            if any(stored.submitter != who.name for stored in some):
                self._access.read(who, "", "ListRuns")
            return pb.ListRunsReply(runs=[self._info(stored) for stored in some])

        return await self._answer(context, Role.SUBMITTER, listed)

    async def ShowRun(self, request: pb.RunRequest, context: Any) -> pb.RunInfo:  # noqa: N802
        """One run, with the members whose answers have not counted."""

        def shown(who: Identity) -> pb.RunInfo:
            stored = self._read(who, request.id, "ShowRun")
            info = self._info(stored)
            info.incomplete.extend(incomplete_members(self._base.store, stored))
            return info

        return await self._answer(context, Role.SUBMITTER, shown)

    async def StopRun(self, request: pb.StopRunRequest, context: Any) -> pb.RunInfo:  # noqa: N802
        """End a run."""

        def stop(who: Identity) -> pb.RunInfo:
            reason = " ".join(request.reason.split())[:500] or f"stopped by {who.name}"
            if not self._get_owned(who, request.id, "StopRun").status.final:
                self._record(who, Action.STOPPED, request.id, reason=reason)
            return self._info(self._base.supervisor.stop(request.id, reason))

        return await self._answer(context, Role.SUBMITTER, stop)

    async def RemoveRun(self, request: pb.RunRequest, context: Any) -> pb.RunInfo:  # noqa: N802
        """Delete what a run that has ended keeps on the disk."""

        def remove(who: Identity) -> pb.RunInfo:
            stored = self._get_owned(who, request.id, "RemoveRun")
            if not stored.status.final:
                raise UsageError(
                    f"run {stored.id} has not ended; stop it first: fedpeft run stop {stored.id}"
                )
            self._record(who, Action.REMOVED, stored.id)
            self._base.store.remove_files(stored.id)
            return self._info(self._base.supervisor.get(stored.id))

        return await self._answer(context, Role.SUBMITTER, remove)

    async def Logs(self, request: pb.LogsRequest, context: Any) -> AsyncIterator[pb.LogLine]:  # noqa: N802
        """Lines so far; when followed, until the run has ended."""
        after = request.after
        while True:

            def more(who: Identity, since: int = after) -> tuple[bool, list[pb.LogLine]]:
                # Asked before the lines are read: what is written between the two is not lost.
                ended = self._read(who, request.id, "Logs").status.final
                lines = self._base.store.runs.lines(request.id, after=since)
                return ended, [
                    pb.LogLine(number=line.number, time_ms=milliseconds(line.at), json=line.text)
                    for line in lines
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

            def files(who: Identity) -> tuple[pb.Unfinished | None, list[tuple[str, Path]]]:
                folder, unfinished = self._result(self._readable(who, request.id, "PullResult"), stack)
                found = [(path.relative_to(folder).as_posix(), path) for path in list_pullable_files(folder)]
                if not found:
                    raise UsageError(
                        f"run {request.id} has no files: it ended before its first round, or they are removed"
                    )
                reached = {} if unfinished is None else {"round": unfinished.round}
                self._record(who, Action.PULLED, request.id, **reached)
                return unfinished, found

            unfinished, found = await self._answer_long(context, Role.SUBMITTER, files)
            for name, path in found:
                chunks = result_chunks(name, path)

                def following(_: Identity, left: Iterator[pb.ResultChunk] = chunks) -> pb.ResultChunk | None:
                    return next(left, None)

                while chunk := await self._answer(context, Role.SUBMITTER, following):
                    if unfinished is not None:
                        chunk.unfinished.CopyFrom(unfinished)
                    yield chunk

    def _result(self, stored: StoredRun, stack: ExitStack) -> tuple[Path, pb.Unfinished | None]:
        """A run's folder, or one with what it has reached, which goes with the stack."""
        store = self._base.store
        if stored.status.final:
            return store.run_folder(stored.id), None
        folder = stack.enter_context(store.scratch()) / "run"
        reached = self._base.supervisor.snapshot(stored.id, folder)
        return folder, pb.Unfinished(round=reached, rounds=stored.run.run.rounds)

    async def ListAgents(self, request: pb.ListAgentsRequest, context: Any) -> pb.ListAgentsReply:  # noqa: N802
        """Those that are here and those that were; what each did is for admins, as it tells who took part."""

        def listed(who: Identity) -> pb.ListAgentsReply:
            counted, standing = who.role is Role.ADMIN, self._base.desk().standing()
            shown = agent_info if counted else outline_agent
            now = {status.name: shown(status) for status in self._base.desk().agents()}
            for sighting in self._base.store.agents.list():
                if sighting.name not in now:
                    now[sighting.name] = pb.AgentInfo(
                        name=sighting.name, last_seen_ms=milliseconds(sighting.last_seen)
                    )
            authority = self._base.authority  # without it a server knows serial numbers, and no names
            for name in authority.list_revoked(datetime.now(UTC)) if authority is not None else ():
                if name in now:
                    now[name].revoked = True
            agents = [now[name] for name in sorted(now)]
            info = server_info(standing) if counted else outline_server(standing)
            return pb.ListAgentsReply(agents=agents, server=info, counted=counted)

        return await self._answer(context, Role.SUBMITTER, listed)

    async def IssueToken(self, request: pb.IssueTokenRequest, context: Any) -> pb.IssueTokenReply:  # noqa: N802
        """A one-time token for a device or a person."""

        def issue(who: Identity) -> pb.IssueTokenReply:
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
            self._record(who, Action.INVITED, request.name, role=role, seconds=life.total_seconds())
            text = authority.tokens.invite(Identity(request.name, role), now, life)
            return pb.IssueTokenReply(token=text, expires_ms=milliseconds((now + life).timestamp()))

        return await self._answer(context, Role.ADMIN, issue)

    async def RevokeAgent(self, request: pb.RevokeAgentRequest, context: Any) -> pb.RevokeAgentReply:  # noqa: N802
        """End what a name may do, at once."""

        def revoke(who: Identity) -> pb.RevokeAgentReply:
            authority, now = self._authority(), datetime.now(UTC)
            if is_held(authority, request.name, now):
                reason = " ".join(request.reason.split())[:500]
                self._record(who, Action.REVOKED, request.name, reason=reason)
            count = authority.revoke(request.name, now)
            self._base.desk().disconnect(request.name, "its certificate was revoked")
            return pb.RevokeAgentReply(revoked=count > 0)

        return await self._answer(context, Role.ADMIN, revoke)

    async def _answer(self, context: Any, role: Role, work: Callable[[Identity], Answer]) -> Answer:
        """Check the caller's role and do the work on a thread; errors are the front door's."""
        return await asyncio.to_thread(work, await self._let_in(context, role))

    async def _answer_long(self, context: Any, role: Role, work: Callable[[Identity], Answer]) -> Answer:
        """As `_answer`, for work that a run file or a run may hold up: the other calls' threads stay free."""
        who = await self._let_in(context, role)
        async with self._turns.turn(who.name):
            doing = asyncio.get_running_loop().run_in_executor(self._long, work, who)
            try:
                return await asyncio.shield(doing)
            finally:  # a caller that hangs up keeps its turn for as long as its thread is at work
                await asyncio.wait([doing])

    async def _let_in(self, context: Any, role: Role) -> Identity:
        """Return who calls; one whose role does not allow the call is in the audit log, and refused."""
        try:
            return self._base.gate.require(context, role)
        except CredentialError:
            who = self._base.gate.identity(context)
            if who is not None:
                self._access.refuse(who, "", f"a call for {role}s")
            raise

    def _readable(self, who: Identity, run_id: str, call: str) -> StoredRun:
        """Return a run that the caller may read; to others it is as if there were none."""
        stored = self._base.supervisor.get(run_id)
        try:
            return require_reader(who, stored)
        except UsageError:
            self._access.refuse(who, stored.id, call)
            raise

    def _read(self, who: Identity, run_id: str, call: str) -> StoredRun:
        """As `_readable`; one that is somebody else's is read on the record."""
        stored = self._readable(who, run_id, call)
        if stored.submitter != who.name:
            self._access.read(who, stored.id, call)
        return stored

    def _get_owned(self, who: Identity, run_id: str, call: str) -> StoredRun:
        """Return a run that the caller may stop and remove."""
        stored = self._readable(who, run_id, call)
        try:
            return require_owner(who, stored)
        except CredentialError:
            self._access.refuse(who, stored.id, call)
            raise

    def _record(self, who: Identity, action: Action, subject: str, **detail: str | int | float) -> None:
        """Have it in the audit log that the caller is about to do this."""
        self._base.store.audit.record(Actor(who.name, who.role), action, subject, **detail)

    def _authority(self) -> Authority:
        if self._base.authority is None:
            raise UsageError(
                "this server does not issue certificates; use fedpeft provision where the authority is"
            )
        return self._base.authority

    def _info(self, stored: StoredRun) -> pb.RunInfo:
        return run_info(self._base.store, stored)


def _readers_of(request: pb.SubmitRunRequest) -> tuple[str, ...]:
    if len(request.readers) > _READERS:
        raise UsageError(
            f"{len(request.readers)} readers were named, {_READERS} are the most; use {EVERYONE!r}"
        )
    return tuple(name if name == EVERYONE else check_name(name) for name in request.readers)
