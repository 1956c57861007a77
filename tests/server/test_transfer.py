"""Blobs: resumed from the last byte, bounded, checked, a few at a time."""

from __future__ import annotations

import asyncio
import hashlib
import os
import pickle
import sys
import zlib
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedpeft.v1 import federation_pb2 as pb
from fedpeft.wire.content import encode_content
from fedpeft_client.transport.session import Session
from fedpeft_server.store.memory_store import MemoryBlobs
from fedpeft_server.transport.grpc_grid import GrpcGrid
from fedpeft_server.transport.serving import RunningServer
from tests.server.fleet import RUN, federation, messages, played, server

CHUNK = 1024
BODY = encode_content({"update": {"payload": bytes(range(256)) * 40}})  # somewhat more than 10,240 bytes
DIGEST = hashlib.sha256(BODY).digest()
META = (("fedpeft-agent", "site-a"),)


class Scene:
    """A server, an agent's stub, and the task that the agent was given."""

    def __init__(self, running: RunningServer, stub: Any, link: Session, task: pb.Task) -> None:
        self.running, self.stub, self.link, self.task = running, stub, link, task

    async def upload(
        self,
        chunks: list[pb.BlobChunk],
        *,
        digest: bytes = DIGEST,
        size: int = len(BODY),
        task: bytes | None = None,
    ) -> tuple[list[pb.BlobProgress], grpc.StatusCode, str]:
        """Open, wait for the go-ahead, send chunks, end; what came back."""
        call = self.stub.PushBlob(metadata=META)
        came = []
        try:
            await call.write(
                pb.BlobUpload(open=pb.BlobOpen(digest=digest, size=size, task=task or self.task.id))
            )
            progress = await call.read()
            if progress is not grpc.aio.EOF:
                came.append(progress)
            for chunk in chunks:
                await call.write(pb.BlobUpload(chunk=chunk))
            await call.done_writing()
            while (progress := await call.read()) is not grpc.aio.EOF:
                came.append(progress)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass
        return (
            [progress for progress in came if not progress.refused],
            await call.code(),
            await call.details(),
        )


def pieces(start: int = 0, body: bytes = BODY, size: int = CHUNK) -> list[pb.BlobChunk]:
    return [
        pb.BlobChunk(offset=at, data=body[at : at + size], crc32=zlib.crc32(body[at : at + size]))
        for at in range(start, len(body), size)
    ]


@asynccontextmanager
async def scene(running: RunningServer, grid: GrpcGrid, state: bytes = b"s" * 5000) -> AsyncIterator[Scene]:
    async with grpc.aio.insecure_channel(running.address) as channel:
        link = await Session.open(channel, "site-a", {})
        grid.push_messages(messages(grid, ["site-a"], state))
        async for message in link.messages():
            if message.WhichOneof("message") == "task":
                break
        yield Scene(running, federation(channel), link, message.task)
        link.close()


@pytest.fixture
def running() -> Iterator[RunningServer]:
    with server(max_inline_bytes=1024, chunk_bytes=CHUNK, upload_credits=1, stall_s=0.5) as started:
        yield started


@pytest.fixture
def grid(running: RunningServer) -> GrpcGrid:
    return running.grid(RUN, max_result_bytes=20_000)


def test_an_upload_that_was_cut_goes_on_from_its_last_byte(running: RunningServer, grid: GrpcGrid) -> None:
    async def play() -> None:
        async with scene(running, grid) as on:
            came, code, details = await on.upload(pieces(body=BODY[:3000]))
            assert [progress.offset for progress in came] == [0]
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert f"ended after 3000 of {len(BODY)} bytes" in details
            came, code, _ = await on.upload(pieces(3000))
            assert [(progress.offset, progress.complete) for progress in came] == [
                (3000, False),
                (len(BODY), True),
            ]
            assert code is grpc.StatusCode.OK
            came, code, _ = await on.upload([])  # once more, after a lost answer
            assert [progress.complete for progress in came] == [True]

    played(play())


def test_a_blob_comes_over_a_connection_of_its_own_that_is_closed_after_it(
    running: RunningServer, grid: GrpcGrid
) -> None:
    dialled: list[grpc.aio.Channel] = []

    def dial() -> grpc.aio.Channel:
        dialled.append(grpc.aio.insecure_channel(running.address))
        return dialled[-1]

    async def play() -> None:
        async with grpc.aio.insecure_channel(running.address) as channel:
            link = await Session.open(channel, "site-a", {}, dial)
            assert dialled == []
            grid.push_messages(messages(grid, ["site-a"], b"s" * 5000))
            message = await anext(link.messages())
            reference = await link.push(message.task.id, BODY, hashlib.sha256(BODY).digest())
            assert reference == pb.BlobRef(digest=DIGEST, size=len(BODY))
            (own,) = dialled
            assert own.get_state() is grpc.ChannelConnectivity.SHUTDOWN
            link.close()

    played(play())


def test_the_agents_own_upload_resumes(running: RunningServer, grid: GrpcGrid) -> None:
    async def play() -> None:
        async with scene(running, grid) as on:
            await on.upload(pieces(body=BODY[:7000]))
            reference = await on.link.push(on.task.id, BODY, hashlib.sha256(BODY).digest())
            assert reference == pb.BlobRef(digest=DIGEST, size=len(BODY))

    played(play())


def changed() -> list[pb.BlobChunk]:
    chunk = pieces()[0]
    return [pb.BlobChunk(offset=0, data=chunk.data[:-1] + b"y", crc32=chunk.crc32)]


def whole_of(body: bytes) -> dict[str, Any]:
    return {"digest": hashlib.sha256(body).digest(), "size": len(body)}


PICKLE = pickle.dumps([Path("x")] * 600)
TABLE = b'{"a": "b"}\n' * 600
ARCHIVE = b"PK\x03\x04" * 600

REFUSED: dict[str, tuple[list[pb.BlobChunk], dict[str, Any], str]] = {
    "a chunk changed on its way": (changed(), {}, "was changed on its way"),
    "a pickle": (pieces(body=PICKLE), whole_of(PICKLE), "that are no result came"),
    "a pickle in small pieces": (pieces(body=PICKLE, size=7), whole_of(PICKLE), "that are no result came"),
    "a table": (pieces(body=TABLE), whole_of(TABLE), "that are no result came"),
    "an archive": (pieces(body=ARCHIVE), whole_of(ARCHIVE), "that are no result came"),
    "a chunk left out": (pieces(CHUNK), {}, "the chunk at 0 was due"),
    "more than announced": (pieces(body=BODY + bytes(99)), {}, f"more than the announced {len(BODY)} bytes"),
    "another size than its own": (pieces(), {"size": 500}, "500 bytes that are no result came"),
    "other bytes than announced": (
        pieces(body=BODY[:-9] + bytes(9)),
        {},
        "other bytes came than were announced",
    ),
    "too large": ([], {"size": 20_001}, "20001 bytes was announced, this run takes 20000"),
    "another task": ([], {"task": b"?" * 16}, "nobody waits for a result of this task"),
    "no digest": ([], {"digest": b"short"}, "was announced"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_refused_leaves_nothing_whole(running: RunningServer, grid: GrpcGrid, name: str) -> None:
    chunks, options, words = REFUSED[name]

    async def play() -> None:
        async with scene(running, grid) as on:
            came, code, details = await on.upload(chunks, **options)
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert words in details
            assert not any(progress.complete for progress in came)

    played(play())


def test_uploads_wait_for_a_credit_and_stalled_ones_lose_theirs(
    running: RunningServer, grid: GrpcGrid
) -> None:
    async def play() -> None:
        async with scene(running, grid) as on:
            opened = pb.BlobUpload(open=pb.BlobOpen(digest=DIGEST, size=len(BODY), task=on.task.id))
            holder = on.stub.PushBlob(metadata=META)
            await holder.write(opened)
            assert (await holder.read()).offset == 0  # it has the only credit, and sends nothing
            waiting = asyncio.create_task(on.upload(pieces()))
            await asyncio.sleep(0.2)
            assert not waiting.done()
            came, code, _ = await waiting
            assert came[-1].complete
            assert code is grpc.StatusCode.OK
            assert await holder.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    played(play())


def test_a_body_comes_from_any_byte_and_to_its_own_agent_only(running: RunningServer, grid: GrpcGrid) -> None:
    async def play() -> None:
        async with scene(running, grid) as on:
            whole = await on.link.pull(on.task.id, on.task.blob, bytearray())
            assert hashlib.sha256(whole).digest() == on.task.blob.digest
            assert await on.link.pull(on.task.id, on.task.blob, bytearray(whole[:2345])) == whole
            request = pb.PullBlobRequest(digest=on.task.blob.digest, task=on.task.id)
            call = on.stub.PullBlob(request, metadata=(("fedpeft-agent", "site-b"),))
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT

    played(play())


def test_an_agent_notices_a_body_that_is_another(running: RunningServer, grid: GrpcGrid) -> None:
    async def play() -> None:
        async with scene(running, grid) as on:
            begun = bytearray(b"wrong" * 100)
            with pytest.raises(Exception, match="not the one announced"):
                await on.link.pull(on.task.id, on.task.blob, begun)
            assert not begun

    played(play())


def test_the_memory_blobs_of_tests_keep_whole_blobs_only() -> None:
    blobs = MemoryBlobs()
    partial = blobs.begin(DIGEST.hex(), len(BODY))
    partial.write(BODY)
    assert not blobs.has(DIGEST.hex())
    partial.finish()
    with blobs.reading(DIGEST.hex()) as content:
        assert content == BODY


def test_a_run_may_narrow_what_its_grid_takes(running: RunningServer) -> None:
    grid = running.grid(RUN, max_result_bytes=20_000)
    grid.set_result_limit(15_000)
    grid.set_result_limit(30_000)

    async def play() -> str:
        async with scene(running, grid) as on:
            _, _, details = await on.upload([], size=15_001)
            return str(details)

    assert "15001 bytes was announced, this run takes 15000" in played(play())


HANGS_UP = """
import hashlib, queue, sys, zlib
import grpc
from fedpeft.v1 import federation_pb2 as pb, federation_pb2_grpc as rpc
from fedpeft.wire.content import encode_content

address, task = sys.argv[1], bytes.fromhex(sys.argv[2])
body = encode_content({"update": {"payload": bytes(range(256)) * 40}})
digest = hashlib.sha256(body).digest()
for _ in range(40):
    channel = grpc.insecure_channel(address, options=(("grpc.use_local_subchannel_pool", 1),))
    sent = queue.Queue()
    sent.put(pb.BlobUpload(open=pb.BlobOpen(digest=digest, size=len(body), task=task)))
    call = rpc.FederationStub(channel).PushBlob(iter(sent.get, None), metadata=(("fedpeft-agent", "site-a"),))
    progress = next(call)
    if not progress.complete:
        for at in range(0, len(body), 1000):
            data = body[at : at + 1000]
            sent.put(pb.BlobUpload(chunk=pb.BlobChunk(offset=at, data=data, crc32=zlib.crc32(data))))
        progress = next(call)
    assert progress.complete
    channel.close()
"""


def test_an_agent_that_hangs_up_on_the_last_word_has_broken_nothing_off(
    running: RunningServer, grid: GrpcGrid
) -> None:
    """It is another process, which hears that its blob is durable before the server is done saying so."""

    async def play() -> tuple[int, Mapping[str, int]]:
        async with scene(running, grid) as on:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                HANGS_UP,
                running.address,
                on.task.id.hex(),
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
            ended = await process.wait()
            return ended, running.refusals.totals()  # before the scene cuts its own session

    assert played(play(), 60.0) == (0, {})
