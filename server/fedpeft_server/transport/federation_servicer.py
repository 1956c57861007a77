"""The `Federation` service of the schema: lets callers in, reads and writes, and delegates the rest."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any

import grpc

from fedpeft import __version__
from fedpeft.errors import CredentialError, FederationError, FedPEFTError, LimitError, UpdateError
from fedpeft.v1 import federation_pb2 as pb
from fedpeft_server.transport.blob_transfer import Transfers
from fedpeft_server.transport.callers import Caller, Gate
from fedpeft_server.transport.grpc_options import TransportOptions
from fedpeft_server.transport.refusals import Reason, Refused
from fedpeft_server.transport.request_guard import Unreadable
from fedpeft_server.transport.result_ingest import ResultIngest
from fedpeft_server.transport.sessions import Connection, Hub
from fedpeft_server.transport.tls import Enrol

# Sent by itself, before anything: else it goes with the first message, and gRPC cannot end a call whose first
# message is still on its way to a peer that does not read.
_NONE: tuple[tuple[str, str], ...] = ()
_LET_DOWN_S = 1.0
_PARTING_S = 0.05  # in which a call that was cut is cancelled; one whose other side has said its last is not
_ENROLLING = 2  # at a time, so that threads are left for what people ask
_LATE_S = 1.0  # what a session says within it may have been on its way when it died
_BEATS = 1.5  # heartbeats, of which one is heard of a session that is alive
_LOOK_S = 0.25
LOG = logging.getLogger("fedpeft.server")


class FederationServicer:
    """One instance serves all agents. Its methods are the schema's, called by `RequestGuard`.

    Args:
        enrol: what `Enroll` does, on a thread; None where there are no certificates.
    """

    def __init__(
        self,
        hub: Hub,
        intake: ResultIngest,
        transfers: Transfers,
        gate: Gate,
        options: TransportOptions,
        enrol: Enrol | None,
    ) -> None:
        self._hub, self._intake, self._transfers, self._gate = hub, intake, transfers, gate
        self._options, self._enrol, self._shares = options, enrol, hub.shares
        self._enrolling = asyncio.Semaphore(_ENROLLING)

    async def Enroll(self, request: pb.EnrollRequest, context: Any) -> pb.EnrollReply:  # noqa: N802  # the schema's
        """Token and signing request to certificate."""
        if self._enrol is None:
            raise FederationError(
                "this server issues no certificates; ask its admin for a provisioned folder"
            )
        self._options.protocol.answer(request.protocol_version)
        try:
            async with self._enrolling:
                return await asyncio.to_thread(self._enrol, request, context)
        except CredentialError as error:
            raise Refused(Reason.TOKEN if request.token else Reason.CALLER, error) from error

    async def Session(self, _: Any, context: Any) -> None:  # noqa: N802
        """An agent's connection, until one side ends it."""
        await context.send_initial_metadata(_NONE)
        try:
            connection = await self._admit(context)
        except asyncio.CancelledError:
            self._shares.count(
                self._gate.share(context), Reason.BROKEN_OFF, "a session was cut before it began"
            )
            raise
        ending: tuple[grpc.StatusCode, str] | None = None
        try:
            await self._serve_connection(connection, context)
        except (Refused, FedPEFTError, TimeoutError) as error:
            ending = self._shares.end_call(connection.caller.name, error)
        except asyncio.CancelledError:  # how gRPC says that the other side, or it itself, has ended the call
            if not connection.closed:
                self._shares.count(connection.caller.name, Reason.BROKEN_OFF, "its session was cut")
            raise
        finally:
            self._hub.close_connection(connection)
        if ending is not None:  # last, as a peer that does not read keeps this waiting
            await context.abort(*ending)

    async def PushBlob(self, _: Any, context: Any) -> None:  # noqa: N802
        """A result too large for its session."""
        await context.send_initial_metadata(_NONE)
        caller, durable = self._identify(context), False
        try:
            size = await self._transfers.receive(caller, context)
            durable = True
            await context.write(pb.BlobProgress(offset=size, complete=True))
            return
        except (Refused, FedPEFTError, TimeoutError) as error:
            code, details = self._shares.end_call(caller.name, error)
            stalled = isinstance(error, TimeoutError)  # then a read is still under way; there can be one only
        except asyncio.CancelledError:
            if not durable:  # else the other side has hung up on our last word, which ends all the same
                self._shares.count(caller.name, Reason.BROKEN_OFF, "its upload was cut")
            raise
        if not stalled:  # outside the handlers above: an error's traceback holds the message that it is about
            await _let_down(context, details)
        await context.abort(code, details)

    async def PullBlob(self, request: pb.PullBlobRequest, context: Any) -> None:  # noqa: N802
        """A task's body too large for its session."""
        await context.send_initial_metadata(_NONE)
        caller = self._identify(context)
        try:
            async for chunk in self._transfers.send(caller, request):
                async with asyncio.timeout(self._options.stall_s):
                    await context.write(chunk)
        except (Refused, FedPEFTError, TimeoutError) as error:
            await context.abort(*self._shares.end_call(caller.name, error))

    def _identify(self, context: Any) -> Caller:
        """The agent behind a call beside its session: by certificate, or without TLS by the name it gives."""
        claimed = dict(context.invocation_metadata() or ()).get("fedpeft-agent", "")
        return self._gate.agent(context, claimed)

    async def _admit(self, context: Any) -> Connection:
        """The first message, answered."""
        async with asyncio.timeout(self._options.hello_s):
            first = await context.read()
        if isinstance(first, Unreadable):
            raise first.refused
        if not isinstance(first, pb.AgentMessage) or first.WhichOneof("message") != "hello":
            raise _error_of_malformed("a session begins with a hello; another message came")
        hello = first.hello
        version = self._options.protocol.answer(hello.protocol_version)
        if len(hello.capabilities) > 32 or sum(len(k) + len(v) for k, v in hello.capabilities.items()) > 4096:
            raise _error_of_malformed("the hello states too many capabilities; at most 32 are accepted")
        caller = self._gate.agent(context, hello.name)
        self._shares.session(caller.name)
        here = self._hub.connected
        if len(here) >= self._options.max_sessions and caller.name not in here:
            raise Refused(Reason.FULL, LimitError(f"{len(here)} agents are connected already; try later"))
        await self._wait_for_older(caller.name, context.peer())
        connection = self._hub.open(caller, context.peer(), hello)
        connection.tell(
            pb.ServerMessage(
                welcome=pb.Welcome(
                    protocol_version=version,
                    server=f"fedpeft {__version__}",
                    name=caller.name,
                    heartbeat_ms=round(1000 * self._options.heartbeat_s),
                    max_inline_bytes=self._options.max_inline_bytes,
                    chunk_bytes=self._options.chunk_bytes,
                    session=connection.session,
                )
            )
        )
        self._hub.remind(connection)
        return connection

    async def _wait_for_older(self, name: str, address: str) -> None:
        """Let a session of the same name show whether it is alive: it may be another machine with the key.

        One that has died without a word, as with the power, says nothing for longer than agents' heartbeats
        are apart, and makes way.

        Raises:
            Refused: it is alive.
        """
        older, began, heartbeat_s = self._hub.connection(name), time.monotonic(), self._options.heartbeat_s
        while older is not None and older is self._hub.connection(name) and not older.closed:
            now = time.monotonic()
            if older.heard_s - began > min(_LATE_S, heartbeat_s / 4):
                twice = (
                    f"{name} is connected from {older.address} and answers, and a second machine with its key"
                    f" came from {address}; end one of them, or give it a name and key of its own"
                )
                raise Refused(Reason.TWICE, LimitError(twice))
            if now - began > _BEATS * heartbeat_s:
                LOG.warning("%s at %s is silent and makes way for %s", name, older.address, address)
                return
            await asyncio.sleep(min(_LOOK_S, heartbeat_s / 4))

    async def _serve_connection(self, connection: Connection, context: Any) -> None:
        """Read and write until the agent leaves, says nothing, doesn't read, or the connection is closed."""
        tasks = [
            asyncio.create_task(self._read(connection, context)),
            asyncio.create_task(self._write(connection, context)),
        ]
        aged = asyncio.get_running_loop().call_later(
            self._options.max_session_s, connection.close, "it is time to dial again"
        )
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            aged.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()

    async def _read(self, connection: Connection, context: Any) -> None:
        silence_s = 3 * self._options.heartbeat_s
        while True:
            async with asyncio.timeout(silence_s):
                message = await context.read()
            if isinstance(message, Unreadable):
                raise message.refused
            if not isinstance(message, pb.AgentMessage):  # the agent has ended its side, or gRPC the call
                await asyncio.sleep(_PARTING_S)
                return
            self._shares.message(connection.caller.name)
            self._hub.record_seen(connection)
            await self._handle(connection, message)

    async def _write(self, connection: Connection, context: Any) -> None:
        while True:
            message = await connection.next_message()
            if message.WhichOneof("message") == "task":
                self._gate.still(connection.caller)
            async with asyncio.timeout(self._options.stall_s):
                await context.write(message)
            if message.WhichOneof("message") == "goodbye":
                return

    async def _handle(self, connection: Connection, message: pb.AgentMessage) -> None:
        kind, name = message.WhichOneof("message"), connection.caller.name
        if kind == "result":
            await self._intake.take(connection.caller, message.result)
        elif kind == "refusal":
            self._hub.record_refusal(name, message.refusal)
        elif kind == "heartbeat":
            self._gate.still(connection.caller)  # results are checked with their signatures
            connection.tell(pb.ServerMessage(heartbeat=message.heartbeat))
        elif kind != "received":
            raise _error_of_malformed(
                f"a {kind or 'message of no known kind'} came in the middle of a session"
            )


async def _let_down(context: Any, details: str) -> None:
    """Tell an uploader that its blob is refused, and wait a moment for it to stop.

    A call that ends while its other side writes shows that side gRPC's own error instead of the reason.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LET_DOWN_S):
            await context.write(pb.BlobProgress(refused=details))
            while isinstance(await context.read(), pb.BlobUpload):
                pass


def _error_of_malformed(line: str) -> Refused:
    return Refused(Reason.MALFORMED, UpdateError(line))
