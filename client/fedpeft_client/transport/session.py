"""One session with the server: messages both ways, and blobs beside them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import grpc

from fedpeft import __version__
from fedpeft.errors import FederationError, UpdateError
from fedpeft.v1 import federation_pb2 as pb
from fedpeft.v1 import federation_pb2_grpc as rpc
from fedpeft.wire.pace import Pace
from fedpeft.wire.protocol import PROTOCOL, ProtocolWindow
from fedpeft_client.transport.dialing import error_named
from fedpeft_client.transport.egress import EgressLedger, Facts, Outgoing
from fedpeft_client.transport.server_bounds import Flow, check_piece, check_task, check_welcome

_PARTING_S = 0.5
_STALL_S = 60.0  # without a byte in the middle of a blob
Dial = Callable[[], grpc.aio.Channel]


class Session:
    """An open session; `open` makes it, `close` ends it.

    Attributes:
        welcome: what the server said of itself and its bounds.
    """

    def __init__(
        self, stub: Any, call: Any, welcome: pb.Welcome, dial: Dial | None, ledger: EgressLedger | None
    ) -> None:
        self._stub, self._call, self.welcome, self._dial = stub, call, welcome, dial
        self._ledger = ledger
        self._writing = asyncio.Lock()
        self._metadata = (("fedpeft-agent", welcome.name),)  # heeded only where there are no certificates
        self._beat = asyncio.create_task(self._beating())

    @classmethod
    async def open(
        cls,
        channel: grpc.aio.Channel,
        name: str,
        capabilities: Mapping[str, str],
        dial: Dial | None = None,
        ledger: EgressLedger | None = None,
        protocol: ProtocolWindow = PROTOCOL,
    ) -> Session:
        """Say hello and wait for the welcome.

        Args:
            dial: opens one more connection, for a blob, closed after it: gRPC keeps receive buffers that are
                as large as what once came quickly, up to a megabyte, for as long as a connection lasts, and
                a server has a thousand. None: blobs go over `channel`.
            ledger: told of every message before it is sent; None: nobody's, in tests and benchmarks.
            protocol: the versions that this agent speaks.

        Raises:
            grpc.aio.AioRpcError: the server cannot be reached or does not want this agent.
            ProtocolError: it speaks no version of the protocol that this agent does.
            FederationError: it began with something else than a welcome, or sets bounds that no agent takes.
        """
        stub = _stub(channel)
        call = stub.Session()
        hello = pb.Hello(
            protocol_version=protocol.newest,
            name=name,
            software=f"fedpeft {__version__}",
            capabilities=capabilities,
        )
        await _write(ledger, call, pb.AgentMessage(hello=hello))
        first = await call.read()
        if not isinstance(first, pb.ServerMessage):
            raise await _error_of_call(call) or FederationError(
                "the server ended the session before it began; dialling again"
            )
        welcome = first.welcome
        try:
            if first.WhichOneof("message") != "welcome":
                raise FederationError("the server began with something else than a welcome; dialling again")
            protocol.accept(welcome.protocol_version)
            check_welcome(welcome)
        except FederationError:
            call.cancel()
            raise
        return cls(stub, call, welcome, dial, ledger)

    async def send(self, message: pb.AgentMessage, facts: Facts | None = None) -> None:
        """Send one message; waits while the server does not read.

        Args:
            facts: for the ledger; see `EgressLedger.record`.
        """
        async with self._writing:
            await _write(self._ledger, self._call, message, facts)

    async def messages(self) -> AsyncIterator[pb.ServerMessage]:
        """What the server says, until the session ends without an error.

        Raises:
            grpc.aio.AioRpcError: it ended with one.
            FederationError: the server has been silent for too long, or sent a task that none of ours sends.
        """
        flow = Flow()
        silence_s = 3 * self.welcome.heartbeat_ms / 1000
        while True:
            try:
                async with asyncio.timeout(silence_s):
                    message = await self._call.read()
            except TimeoutError:
                raise FederationError(
                    f"the server has said nothing for {silence_s:g} s; dialling again"
                ) from None
            if not isinstance(message, pb.ServerMessage):
                error = await _error_of_call(self._call)
                if error is not None:
                    raise error
                return
            if message.WhichOneof("message") == "task":
                check_task(message.task, self.welcome)
            await flow.step()
            yield message

    async def push(
        self, task: bytes, body: bytes, digest: bytes, sent: Callable[[int], None] = lambda size: None
    ) -> pb.BlobRef:
        """Send a body, whose SHA-256 is `digest`, as a blob, from where an earlier attempt stopped.

        Args:
            sent: told of the bytes of each piece, once it has left.

        Raises:
            FedPEFTError: the server does not want it.
            grpc.aio.AioRpcError: cut; what came stays at the server.
        """
        async with contextlib.AsyncExitStack() as stack:
            stub = self._stub
            if self._dial is not None:
                stub = _stub(await stack.enter_async_context(self._dial()))
            return await self._push(stub.PushBlob(metadata=self._metadata), task, body, digest, sent)

    async def _push(
        self, call: Any, task: bytes, body: bytes, digest: bytes, sent: Callable[[int], None]
    ) -> pb.BlobRef:
        reference = pb.BlobRef(digest=digest, size=len(body))
        opened = pb.BlobOpen(digest=reference.digest, size=reference.size, task=task)
        await _write(self._ledger, call, pb.BlobUpload(open=opened))
        progress = await call.read()  # waits for a credit
        if isinstance(progress, pb.BlobProgress) and not (progress.complete or progress.refused):
            progress = await self._push_chunks(call, body, progress.offset, sent)
        await call.done_writing()
        if isinstance(progress, pb.BlobProgress) and progress.refused:
            raise error_named(progress.refused)
        if not isinstance(progress, pb.BlobProgress) or not progress.complete:
            raise await _error_of_call(call) or FederationError(
                "the server ended an upload without a word; sending it again"
            )
        return reference

    async def _push_chunks(self, call: Any, body: bytes, start: int, sent: Callable[[int], None]) -> Any:
        """Send the chunks from `start` on, until the server answers."""
        answer = asyncio.create_task(call.read())
        if start > len(body):
            raise FederationError(f"the server says that it has {start} bytes of a result of {len(body)}")
        offset, pace = start, Pace(self.welcome.chunk_bytes)
        while offset < len(body) and not answer.done():
            data, began = body[offset : offset + pace.size], time.monotonic()
            chunk = pb.BlobChunk(offset=offset, data=data, crc32=zlib.crc32(data))
            async with asyncio.timeout(_STALL_S):
                await _write(self._ledger, call, pb.BlobUpload(chunk=chunk))
            sent(len(data))
            pace.took(time.monotonic() - began)
            offset += len(data)
        return await answer

    async def pull(self, task: bytes, reference: pb.BlobRef, begun: bytearray) -> bytes:
        """Fetch a body; `begun` holds what an earlier attempt left, and what this one leaves.

        Raises:
            grpc.aio.AioRpcError: refused or cut.
            UpdateError: other bytes came than were announced; `begun` is empty again.
            FederationError: they came in pieces that no server of ours sends.
        """
        request = pb.PullBlobRequest(digest=reference.digest, offset=len(begun), task=task)
        if self._ledger is not None:
            self._ledger.record(request)
        call = self._stub.PullBlob(request, metadata=self._metadata)
        while len(begun) < reference.size:
            async with asyncio.timeout(_STALL_S):
                chunk = await call.read()
            if not isinstance(chunk, pb.BlobChunk):
                raise await _error_of_call(call) or FederationError(
                    "the server ended a blob too early; fetching the rest"
                )
            check_piece(chunk, reference.size - len(begun), self.welcome)
            if chunk.offset != len(begun) or zlib.crc32(chunk.data) != chunk.crc32:
                call.cancel()
                raise UpdateError("a chunk of a task came out of order or changed; fetching it again")
            begun += chunk.data
        call.cancel()
        body = bytes(begun)
        if hashlib.sha256(body).digest() != reference.digest:
            begun.clear()
            raise UpdateError("the body of a task is not the one announced; fetching it again")
        return body

    async def leave(self) -> None:
        """Tell the server that this side has said its last, and wait a moment for it to end the session."""
        self._beat.cancel()
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError):
            async with asyncio.timeout(_PARTING_S):
                await self._call.done_writing()
                await self._call.code()

    def close(self) -> None:
        """End the session."""
        self._beat.cancel()
        self._call.cancel()
        if self._ledger is not None:
            self._ledger.settle()

    async def _beating(self) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, FederationError):  # whoever reads notices the end
            while True:
                await asyncio.sleep(self.welcome.heartbeat_ms / 1000)
                await self.send(pb.AgentMessage(heartbeat=pb.Heartbeat()))


def _stub(channel: grpc.aio.Channel) -> Any:
    return rpc.FederationStub(channel)  # type: ignore[no-untyped-call]  # generated code


async def _write(
    ledger: EgressLedger | None, call: Any, message: Outgoing, facts: Facts | None = None
) -> None:
    """Write down, then write; a call that has ended says why by its status, not by asyncio's own error.

    Everything that an agent streams goes through here.

    Raises:
        StorageError: it cannot be written down, and is not sent.
    """
    if ledger is not None:
        ledger.record(message, facts)
    try:
        await call.write(message)
    except asyncio.InvalidStateError:
        error = await _error_of_call(call)
        raise error or FederationError("the server has ended the call; dialling again") from None


async def _error_of_call(call: Any) -> grpc.aio.AioRpcError | None:
    """Why a call ended; None if without an error."""
    code = await call.code()
    if code == grpc.StatusCode.OK:
        return None
    return grpc.aio.AioRpcError(
        code, await call.initial_metadata(), await call.trailing_metadata(), details=await call.details()
    )
