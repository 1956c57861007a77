"""Blobs up and down, a few at a time.

A blob is written as it comes and hashed off the event loop; a connection that breaks leaves what came, and
the next attempt goes on from there. Uploads wait for a credit, so that memory holds a few chunks for each
upload that runs and nothing for those that wait.
"""

from __future__ import annotations

import asyncio
import functools
import zlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from typing import Protocol, TypeVar

from fedpeft.errors import UpdateError
from fedpeft.v1 import federation_pb2 as pb
from fedpeft_server.callers import Caller
from fedpeft_server.contracts import Blobs, Partial
from fedpeft_server.options import TransportOptions
from fedpeft_server.sessions import Hub

Result = TypeVar("Result")


class Stream(Protocol):
    """What is used of gRPC's stream of an upload: `read` ends with an object that is no message."""

    async def read(self) -> object:
        """The next message."""
        ...

    async def write(self, message: pb.BlobProgress) -> None:
        """Answer."""
        ...


class Transfers:
    """Both directions; the handlers call it with a caller that was let in.

    Args:
        executor: threads for hashing and files.
    """

    def __init__(self, hub: Hub, blobs: Blobs, options: TransportOptions, executor: Executor) -> None:
        self._hub, self._blobs, self._options, self._executor = hub, blobs, options, executor
        self._up = asyncio.Semaphore(options.upload_credits)
        self._down = asyncio.Semaphore(options.download_credits)

    async def receive(self, caller: Caller, stream: Stream) -> None:
        """One upload, from `BlobOpen` to completion.

        Raises:
            UpdateError: nobody waits for it, it is too large, or its bytes are wrong.
            StorageError: it cannot be written.
            TimeoutError: the sender stalled.
        """
        open_ = await self._opened(caller, stream)
        digest = open_.digest.hex()
        async with self._up:
            if await self._off(lambda: self._blobs.has(digest)):
                await stream.write(pb.BlobProgress(offset=open_.size, complete=True))
                return
            partial = await self._off(lambda: self._blobs.begin(digest, open_.size))
            try:
                await stream.write(pb.BlobProgress(offset=partial.offset))
                await self._fill(partial, open_.size, stream)
                await self._off(partial.finish)
            finally:
                await asyncio.shield(self._off(partial.close))
        await stream.write(pb.BlobProgress(offset=open_.size, complete=True))

    async def send(self, caller: Caller, request: pb.PullBlobRequest) -> AsyncIterator[pb.BlobChunk]:
        """A task's body, chunk by chunk.

        Raises:
            UpdateError: it is not the body of a task of this agent.
        """
        body = self._hub.body(caller.name, request.task, request.digest)
        if body is None:
            raise UpdateError("no task of this agent has that body; it was withdrawn, wait for the next task")
        content, step = body.content, self._options.chunk_bytes
        async with self._down:
            for offset in range(request.offset, len(content), step):
                data = content[offset : offset + step]
                yield pb.BlobChunk(offset=offset, data=data, crc32=zlib.crc32(data))

    async def _opened(self, caller: Caller, stream: Stream) -> pb.BlobOpen:
        message = await self._next(stream)
        if message is None or message.WhichOneof("message") != "open":
            raise UpdateError("an upload begins with what it is; another message came")
        open_ = message.open
        work = self._hub.pending(caller.name, open_.task)
        if work is None:
            raise UpdateError("nobody waits for a result of this task any more; drop it")
        if open_.size > work.max_result_bytes or len(open_.digest) != 32:
            raise UpdateError(
                f"a result of {open_.size} bytes was announced, this run takes {work.max_result_bytes}"
            )
        return open_

    async def _fill(self, partial: Partial, size: int, stream: Stream) -> None:
        while partial.offset < size:
            message = await self._next(stream)
            if message is None:
                raise UpdateError(f"the upload ended after {partial.offset} of {size} bytes; send the rest")
            chunk = message.chunk
            if message.WhichOneof("message") != "chunk" or chunk.offset != partial.offset or not chunk.data:
                raise UpdateError(
                    f"the chunk at {partial.offset} was due and another one came; begin again there"
                )
            await self._off(functools.partial(_append, partial, chunk))

    async def _next(self, stream: Stream) -> pb.BlobUpload | None:
        async with asyncio.timeout(self._options.stall_s):
            message = await stream.read()
        return message if isinstance(message, pb.BlobUpload) else None

    async def _off(self, call: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)


def _append(partial: Partial, chunk: pb.BlobChunk) -> None:
    data = chunk.data
    if zlib.crc32(data) != chunk.crc32:
        raise UpdateError(f"the chunk at {chunk.offset} was changed on its way; send it again")
    partial.write(data)
