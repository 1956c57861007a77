"""Blobs up and down, a few at a time.

A blob is written as it comes and hashed off the event loop; a connection that breaks leaves what came, and
the next attempt goes on from there. Uploads wait for a credit, so that memory holds a few chunks for each
upload that runs and nothing for those that wait. Each agent has one turn at a time, see `turns`.
"""

from __future__ import annotations

import asyncio
import functools
import time
import zlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from typing import Protocol, TypeVar

from fedpeft.errors import StorageError, UpdateError
from fedpeft.v1 import federation_pb2 as pb
from fedpeft.wire.content import HEAD_BYTES, is_head_of_record
from fedpeft.wire.pace import Pace
from fedpeft_server.store.contracts import BlobStore, PartialBlob
from fedpeft_server.transport.callers import Caller
from fedpeft_server.transport.fair_queue import FairQueue, Turn
from fedpeft_server.transport.grpc_options import TransportOptions
from fedpeft_server.transport.refusals import Reason, Refused
from fedpeft_server.transport.request_guard import Unreadable
from fedpeft_server.transport.sessions import Hub

Result = TypeVar("Result")
_BATCH_BYTES = 1 << 20  # handed to a thread at a time
_OPENING = 64  # uploads whose first message is awaited at a time: one of each caller
_FLUSHES = 4  # at a time, so that threads are left for what comes in


class UploadStream(Protocol):
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
        trouble: told one line when blobs cannot be written, and None once they can be again; any thread.
    """

    def __init__(
        self,
        hub: Hub,
        blobs: BlobStore,
        options: TransportOptions,
        executor: Executor,
        trouble: Callable[[str | None], None] = lambda line: None,
    ) -> None:
        self._hub, self._blobs, self._options, self._executor = hub, blobs, options, executor
        self._trouble, self._troubled = trouble, False
        self._opening = FairQueue(_OPENING, options.turn_s)
        self._up = FairQueue(options.upload_credits, options.turn_s)
        self._down = FairQueue(options.download_credits, options.turn_s)
        self._flushing = asyncio.Semaphore(_FLUSHES)

    async def receive(self, caller: Caller, stream: UploadStream) -> int:
        """One upload, from `BlobOpen` until it is durable; its bytes.

        Raises:
            Refused: nobody waits for it, it is too large, its bytes are wrong or too many, or its turn is
                over and the rest is wanted later.
            StorageError: it cannot be written.
            TimeoutError: the sender stalled.
        """
        async with self._opening.turn(caller.name):  # what nobody reads yet takes no memory
            open_ = await self._read_open(caller, stream)
        digest = open_.digest.hex()
        async with self._up.turn(caller.name) as turn:
            if await self._off(lambda: self._blobs.has(digest)):
                return int(open_.size)
            partial = await self.write_and_report(lambda: self._blobs.begin(digest, open_.size))
            try:
                await stream.write(pb.BlobProgress(offset=partial.offset))
                await self._fill(partial, open_.size, stream, caller, turn)
            except UpdateError as error:
                await asyncio.shield(self._off(partial.close))
                raise Refused(Reason.CHANGED, error) from error
            except BaseException:
                await asyncio.shield(self._off(partial.close))
                raise
        await self._finish(partial)
        return int(open_.size)

    async def _finish(self, partial: PartialBlob) -> None:
        """Verify and flush, without a turn: nothing of the blob is in memory any more, and disks are slow."""
        try:
            async with self._flushing:
                await self.write_and_report(partial.finish)
        except UpdateError as error:
            raise Refused(Reason.CHANGED, error) from error
        finally:
            await asyncio.shield(self._off(partial.close))

    async def send(self, caller: Caller, request: pb.PullBlobRequest) -> AsyncIterator[pb.BlobChunk]:
        """A task's body, chunk by chunk.

        Raises:
            Refused: it is not the body of a task of this agent, the agent has fetched too much, or its turn
                is over and the rest is to be fetched later.
        """
        body = self._hub.body(caller.name, request.task, request.digest)
        if body is None:
            raise Refused(
                self._hub.reason_unwanted(caller.name, request.task),
                UpdateError("no task of this agent has that body; it was withdrawn, wait for the next task"),
            )
        content, offset, pace = body.content, request.offset, Pace(self._options.chunk_bytes)
        async with self._down.turn(caller.name) as turn:
            while offset < len(content):
                turn.check()
                data, began = content[offset : offset + pace.size], time.monotonic()
                self._hub.shares.bytes(caller.name, down=len(data))
                yield pb.BlobChunk(offset=offset, data=data, crc32=zlib.crc32(data))
                pace.took(time.monotonic() - began)
                offset += len(data)

    async def _read_open(self, caller: Caller, stream: UploadStream) -> pb.BlobOpen:
        message = await self._next(stream)
        if message is None or message.WhichOneof("message") != "open":
            raise _error_of_malformed("an upload begins with what it is; another message came")
        open_ = message.open
        work = self._hub.pending(caller.name, open_.task)
        if work is None:
            error = UpdateError("nobody waits for a result of this task any more; drop it")
            raise Refused(self._hub.reason_unwanted(caller.name, open_.task), error)
        if open_.size > work.max_result_bytes or len(open_.digest) != 32:
            raise Refused(
                Reason.TOO_LARGE,
                UpdateError(
                    f"a result of {open_.size} bytes was announced, this run takes {work.max_result_bytes}"
                ),
            )
        if not self._hub.announce(work, open_.digest):
            raise Refused(
                Reason.QUOTA,
                UpdateError("one more result of this task was announced than can be of use; drop it"),
            )
        return open_

    async def _fill(
        self, partial: PartialBlob, size: int, stream: UploadStream, caller: Caller, turn: Turn
    ) -> None:
        """Read to the end, and write while the next chunks come; what came is written in any case."""
        pages = _Pages(self, partial, size)
        try:
            while pages.offset < size:
                turn.check()
                message = await self._next(stream)
                if message is None:
                    error = UpdateError(
                        f"the upload ended after {pages.offset} of {size} bytes; send the rest"
                    )
                    raise Refused(Reason.BROKEN_OFF, error)
                chunk = message.chunk
                data = chunk.data  # a copy, each time that it is asked for
                if message.WhichOneof("message") != "chunk" or chunk.offset != pages.offset or not data:
                    raise _error_of_malformed(
                        f"the chunk at {pages.offset} was due and another one came; begin again there"
                    )
                self._hub.shares.bytes(caller.name, up=len(data))
                await pages.add(data, chunk.crc32)
        finally:
            await asyncio.shield(pages.flush())

    async def _next(self, stream: UploadStream) -> pb.BlobUpload | None:
        async with asyncio.timeout(self._options.stall_s):
            message = await stream.read()
        if isinstance(message, Unreadable):
            raise message.refused
        return message if isinstance(message, pb.BlobUpload) else None

    async def write_and_report(self, call: Callable[[], Result]) -> Result:
        """As `_off`; people hear of a disk that takes nothing, and of one that does so again."""
        try:
            result = await self._off(call)
        except StorageError as error:
            self._troubled, line = True, str(error)
            await self._off(lambda: self._trouble(line))
            raise
        if self._troubled:
            self._troubled = False
            await self._off(lambda: self._trouble(None))
        return result

    async def _off(self, call: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)


class _Pages:
    """Chunks on their way to a file, several at a time: a thread's work on each costs less than calling it.

    One batch is written while the next one is gathered, so that an upload holds twice `_BATCH_BYTES`. Nothing
    is written before it is seen that the upload begins as a result does.
    """

    def __init__(self, transfers: Transfers, partial: PartialBlob, size: int) -> None:
        self._transfers, self._partial, self._size = transfers, partial, size
        self._is_result = partial.offset > 0  # the rest of one that began so
        self.offset = partial.offset
        self._gathered: list[tuple[bytes, int]] = []
        self._held = 0
        self._writing: asyncio.Task[None] | None = None

    async def add(self, data: bytes, crc32: int) -> None:
        """Take a chunk; waits while two batches are held.

        Raises:
            UpdateError, StorageError: of a batch before it.
        """
        self._gathered.append((data, crc32))
        self._held += len(data)
        self.offset += len(data)
        if self._held >= _BATCH_BYTES:
            await self._release_written()
            self._begin()

    async def flush(self) -> None:
        """Write what is left; raises as `add`."""
        await self._release_written()
        self._begin()
        await self._release_written()

    def _begin(self) -> None:
        if self._gathered and not self._is_result:
            self._is_result = self._begins_well()
        if self._gathered and self._is_result:
            batch, self._gathered, self._held = self._gathered, [], 0
            write = functools.partial(_append, self._partial, batch)
            self._writing = asyncio.create_task(self._transfers.write_and_report(write))

    def _begins_well(self) -> bool:
        """Whether what has come begins as a result does; False where that cannot be told yet.

        Raises:
            Refused: it doesn't.
        """
        head = b"".join(data for data, _ in self._gathered[:HEAD_BYTES])[:HEAD_BYTES]
        if len(head) < min(self._size, HEAD_BYTES):
            return False
        if not is_head_of_record(head, self._size):
            self._gathered, self._held = [], 0
            raise _error_of_malformed(f"{self._size} bytes that are no result came; only results are taken")
        return True

    async def _release_written(self) -> None:
        if self._writing is not None:
            task, self._writing = self._writing, None
            await asyncio.shield(task)


def _append(partial: PartialBlob, batch: list[tuple[bytes, int]]) -> None:
    for data, crc32 in batch:
        if zlib.crc32(data) != crc32:
            raise UpdateError(f"the chunk at {partial.offset} was changed on its way; send it again")
        partial.write(data)


def _error_of_malformed(line: str) -> Refused:
    return Refused(Reason.MALFORMED, UpdateError(line))
