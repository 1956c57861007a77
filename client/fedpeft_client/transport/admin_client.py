"""The server's service of people, as a person's program calls it."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

import grpc

from fedpeft.credentials import Material
from fedpeft.errors import FederationError, UsageError
from fedpeft.runtime.files import folder_atomically, storage
from fedpeft.v1 import federation_pb2 as pb
from fedpeft.v1 import federation_pb2_grpc as rpc
from fedpeft_client.transport.device_certificate import renew_if_due
from fedpeft_client.transport.dialing import STEADY_S, error_of, open_channel

ATTEMPTS, PAUSE_S = 3, 0.5
AWAY_S = 180.0  # for which whoever follows a log waits for a server that is being restarted
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Pulled:
    """What came of a run.

    Attributes:
        names: of the files.
        unfinished: how far a run is that goes on; None: it has ended.
    """

    names: tuple[str, ...]
    unfinished: pb.Unfinished | None


@dataclass(frozen=True)
class AdminClient:
    """Where to call, and as whom.

    Attributes:
        server: HOST:PORT.
        keys: the caller's folder of key and certificate; None: plaintext, on this machine only.
    """

    server: str
    keys: Path | None = None

    async def call(self, ask: Callable[[rpc.AdminStub], Awaitable[Answer]]) -> Answer:
        """One question, asked again if the connection was lost; it must mean the same when it comes twice.

        Raises:
            UsageError: the address cannot be used.
            FedPEFTError: what the server answered, or that it didn't.
        """
        for attempt in range(ATTEMPTS):
            try:
                async with self.stub() as stub:
                    return await ask(stub)
            except grpc.aio.AioRpcError as error:
                lost = error.code() == grpc.StatusCode.UNAVAILABLE
                if not lost or attempt == ATTEMPTS - 1:
                    raise error_of(error, self.server) from error
            await asyncio.sleep(PAUSE_S)
        raise FederationError(f"{self.server} does not answer")

    @asynccontextmanager
    async def stub(self) -> AsyncIterator[rpc.AdminStub]:
        """A connection for several questions or a stream."""
        address = self._address()
        async with open_channel(address, await self._material(address)) as channel:
            yield rpc.AdminStub(channel)  # type: ignore[no-untyped-call]  # generated

    async def lines(self, run_id: str, *, follow: bool) -> AsyncIterator[pb.LogLine]:
        """A run's log, gone on with where it was after a lost connection.

        Raises:
            FedPEFTError: what the server answered, or that it stays away.
        """
        after, gone = 0, 0.0
        while True:
            dialled = time.monotonic()
            try:
                async with self.stub() as stub:
                    async for line in stub.Logs(pb.LogsRequest(id=run_id, follow=follow, after=after)):
                        after, gone = line.number, 0.0
                        yield line
                    return
            except grpc.aio.AioRpcError as error:
                now = time.monotonic()
                gone = now if not gone or now - dialled > STEADY_S else gone
                patience_s = AWAY_S if follow and after else ATTEMPTS * PAUSE_S
                if error.code() != grpc.StatusCode.UNAVAILABLE or now - gone > patience_s:
                    raise error_of(error, self.server) from error
            await asyncio.sleep(PAUSE_S)

    async def pull(self, run_id: str, out: Path) -> Pulled:
        """Write a run's files into a new folder, whole or not at all.

        Raises:
            FedPEFTError: what the server answered, or bytes that are not those it sent.
            StorageError: they cannot be written.
        """
        with storage(out):
            out.parent.mkdir(parents=True, exist_ok=True)
        with folder_atomically(out) as fresh:
            try:
                async with self.stub() as stub:
                    names: list[str] = []
                    unfinished: pb.Unfinished | None = None
                    async for chunk in stub.PullResult(pb.PullResultRequest(id=run_id)):
                        if _write(fresh, chunk):
                            names.append(chunk.path)
                        unfinished = chunk.unfinished if chunk.HasField("unfinished") else None
                    return Pulled(tuple(names), unfinished)
            except grpc.aio.AioRpcError as error:
                raise error_of(error, self.server) from error

    def _address(self) -> str:
        host, colon, port = self.server.rpartition(":")
        if not (host and colon and port.isdecimal()):
            raise UsageError(f"--server {self.server!r} is no address; give HOST:PORT")
        if self.keys is None and not _is_loopback(host):
            raise UsageError(
                f"{host} is another machine and the connection would be plaintext; give --keys, the folder"
                " that fedpeft provision made for you"
            )
        return self.server

    async def _material(self, address: str) -> Material | None:
        return None if self.keys is None else await renew_if_due(self.keys, address)


def _write(folder: Path, chunk: pb.ResultChunk) -> bool:
    """Append a chunk to its file; whether that is whole now."""
    place = PurePosixPath(chunk.path)
    if place.is_absolute() or ".." in place.parts or not place.parts:
        raise FederationError(f"the server sent a file called {chunk.path[:80]!r}, which was not written")
    path = folder.joinpath(*place.parts)
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            if file.tell() != chunk.offset or zlib.crc32(chunk.data) != chunk.crc32:
                raise FederationError(f"{chunk.path}: other bytes came than were sent; pull the run again")
            file.write(chunk.data)
            return file.tell() == chunk.size


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def new_submission() -> str:
    """A name that no other submission has."""
    return os.urandom(16).hex()


def run_and_answer(work: Awaitable[Answer]) -> Answer:
    """Run a question from plain code."""

    async def asked() -> Answer:
        return await work

    return asyncio.run(asked())
