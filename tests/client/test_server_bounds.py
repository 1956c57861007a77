"""Numbers and names that a hostile server says: none wears a device out or gets as far as its files."""

from __future__ import annotations

import asyncio
import hashlib
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedpeft.errors import FederationError, UsageError
from fedpeft.transport.record_bytes import content_bytes
from fedpeft.transport.tasks import TRAIN, Task, task_content
from fedpeft.v1 import federation_pb2 as pb
from fedpeft.v1 import federation_pb2_grpc as rpc
from fedpeft.wire.protocol import NEWEST_PROTOCOL
from fedpeft_client.agent import Agent
from fedpeft_client.client_settings import ClientSettings
from fedpeft_client.policy.owner_policy import Policy
from fedpeft_client.transport.server_bounds import (
    MESSAGES_PER_S,
    Flow,
    check_piece,
    check_task,
    check_welcome,
    shorten,
)
from fedpeft_client.transport.session import Session
from fedpeft_client.workers.in_process_worker import InlineWorkshop
from fedpeft_server.ops.server_settings import read_settings
from tests.server.fleet import APP, RUN, played

WELCOME = pb.Welcome(
    protocol_version=NEWEST_PROTOCOL,
    name="ada",
    heartbeat_ms=15_000,
    max_inline_bytes=4096,
    chunk_bytes=65_536,
)
TASK = pb.Task(id=b"i" * 16, run="run-1", run_digest=bytes.fromhex(RUN.digest), kind=TRAIN, round=1)
BODY = b"x" * 300_000


def welcome(**changed: Any) -> pb.Welcome:
    made = pb.Welcome()
    made.CopyFrom(WELCOME)
    for name, value in changed.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    "changed",
    [
        {"heartbeat_ms": 0},
        {"heartbeat_ms": 99},
        {"heartbeat_ms": 3_600_001},
        {"chunk_bytes": 0},
        {"chunk_bytes": 1},
        {"chunk_bytes": 2**32 - 1},
        {"max_inline_bytes": 2**63},
        {"name": "n" * 257},
        {"name": "ada\nroot"},
    ],
)
def test_a_welcome_beyond_its_bounds_ends_the_session(changed: dict[str, Any]) -> None:
    with pytest.raises(FederationError) as refused:
        check_welcome(welcome(**changed))
    assert "\n" not in str(refused.value)
    check_welcome(WELCOME)

    async def dial() -> None:
        async with (
            served(Server(welcome(**changed))) as address,
            grpc.aio.insecure_channel(address) as channel,
        ):
            await Session.open(channel, "ada", {})

    with pytest.raises(FederationError, match=r"the server (says|calls)"):
        played(dial())


@pytest.mark.parametrize(
    "changed",
    [
        {"id": b""},
        {"id": b"i" * 300},  # a result's file would have its name
        {"run": "r" * 257},
        {"kind": "k" * 257},
        {"run_digest": b"d" * 400},
        {"run_digest": b""},
        {"blob": pb.BlobRef(digest=b"", size=1)},
        {"inline": b"x" * 5000},
    ],
)
def test_a_task_that_no_server_of_ours_makes_ends_the_session(changed: dict[str, Any]) -> None:
    task = pb.Task(**{"id": TASK.id, "run": "r", "run_digest": TASK.run_digest, "kind": TRAIN} | changed)
    with pytest.raises(FederationError, match="a task came"):
        check_task(task, WELCOME)

    async def receive() -> list[pb.ServerMessage]:
        server = Server(WELCOME, [pb.ServerMessage(task=task)])
        async with served(server) as address, grpc.aio.insecure_channel(address) as channel:
            link = await Session.open(channel, "ada", {})
            try:
                return [message async for message in link.messages()]
            finally:
                link.close()

    with pytest.raises(FederationError, match="a task came"):
        played(receive())


@pytest.mark.parametrize(
    ("size", "rest", "sound"),
    [
        (0, 9, False),
        (1, 9, False),
        (9, 9, True),
        (10, 9, False),
        (16_383, 10**9, False),
        (16_384, 10**9, True),
    ],
)
def test_pieces_of_a_blob_are_neither_crumbs_nor_more_than_is_to_come(
    size: int, rest: int, sound: bool
) -> None:
    piece = pb.BlobChunk(data=b"x" * size)
    if sound:
        check_piece(piece, rest, WELCOME)
    else:
        with pytest.raises(FederationError, match=f"a piece of {size} bytes"):
            check_piece(piece, rest, WELCOME)


def test_a_blob_in_crumbs_is_given_up_at_the_first() -> None:
    server = Server(WELCOME, piece=1)

    async def pull() -> None:
        async with served(server) as address, grpc.aio.insecure_channel(address) as channel:
            link = await Session.open(channel, "ada", {})
            try:
                await link.pull(TASK.id, reference(BODY), bytearray())
            finally:
                link.close()

    with pytest.raises(FederationError, match="a piece of 1 bytes"):
        played(pull())


def test_an_upload_that_a_server_says_to_have_more_of_than_there_is_ends() -> None:
    async def push() -> None:
        server = Server(WELCOME, has=len(BODY) + 1)
        async with served(server) as address, grpc.aio.insecure_channel(address) as channel:
            link = await Session.open(channel, "ada", {})
            try:
                await link.push(TASK.id, BODY, hashlib.sha256(BODY).digest())
            finally:
                link.close()

    with pytest.raises(FederationError, match="has 300001 bytes of a result of 300000"):
        played(push())


def test_more_messages_than_a_session_needs_wait() -> None:
    async def flood() -> None:
        flow = Flow()
        for _ in range(MESSAGES_PER_S):
            await asyncio.wait_for(flow.step(), 5.0)
        await asyncio.wait_for(flow.step(), 0.01)

    with pytest.raises(TimeoutError):
        played(flood())


def test_texts_for_people_are_one_line_of_bounded_length() -> None:
    assert shorten("a\nb") == "a b"
    assert len(shorten("x" * 10_000_000)) < 1010


def test_a_server_that_cuts_uploads_gets_no_more_than_the_days_bytes(tmp_path: Path) -> None:
    """The one result is sent again as often as the owner's bytes allow, not for ever."""
    task = pb.Task()
    task.CopyFrom(TASK)
    task.inline = content_bytes(task_content(Task(RUN.digest, 1, b"large:300000")))
    server = Server(WELCOME, [pb.ServerMessage(task=task)], has=0, reads=2)
    policy = Policy(max_bytes_per_day=450_000)
    settings = ClientSettings(server="127.0.0.1:1", data=Path(__file__), insecure=True, policy=policy)

    async def live() -> int:
        async with served(server) as address:
            given = settings.model_copy(update={"server": address})
            agent = Agent(given, "ada", tmp_path / "home", None, APP, InlineWorkshop())
            running = asyncio.create_task(agent.run())
            while not agent._desk._held_back:
                assert not running.done(), running.exception()
                await asyncio.sleep(0.02)
            agent.stop()
            await running
            return agent.status.usage.bytes_up

    assert 0 < played(live(), 60.0) <= 450_000


def test_a_servers_own_settings_keep_to_what_agents_take() -> None:
    for heartbeat_s in (0.01, 4000.0):
        with pytest.raises(UsageError, match=r"limits\.heartbeat_s"):
            read_settings(None, {"insecure": True, "limits": {"heartbeat_s": heartbeat_s}})


# ---- A server by hand


def reference(body: bytes) -> pb.BlobRef:
    return pb.BlobRef(digest=hashlib.sha256(body).digest(), size=len(body))


class Server(rpc.FederationServicer):
    """Says what it is told to.

    Args:
        piece: bytes of each piece of a blob.
        has: bytes of an upload that it says to have.
        reads: pieces of an upload that it reads before it cuts the call.
    """

    def __init__(
        self,
        first: pb.Welcome,
        then: list[pb.ServerMessage] | None = None,
        *,
        piece: int = 65_536,
        has: int = 0,
        reads: int = 0,
    ) -> None:
        self._first, self._then, self._piece, self._has, self._reads = first, then or [], piece, has, reads

    async def Session(self, requests: Any, context: Any) -> AsyncIterator[pb.ServerMessage]:  # noqa: N802
        await anext(requests)
        yield pb.ServerMessage(welcome=self._first)
        for message in self._then:
            yield message
        async for _ in requests:
            pass

    async def PullBlob(self, request: Any, context: Any) -> AsyncIterator[pb.BlobChunk]:  # noqa: N802
        for offset in range(0, len(BODY), self._piece):
            data = BODY[offset : offset + self._piece]
            yield pb.BlobChunk(offset=offset, data=data, crc32=zlib.crc32(data))

    async def PushBlob(self, requests: Any, context: Any) -> AsyncIterator[pb.BlobProgress]:  # noqa: N802
        await anext(requests)
        yield pb.BlobProgress(offset=self._has)
        for _ in range(self._reads):
            await anext(requests)
        if self._reads:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
        async for _ in requests:
            pass


@asynccontextmanager
async def served(servicer: Server) -> AsyncIterator[str]:
    """Its address on loopback."""
    server = grpc.aio.server()
    add: Callable[[Any, Any], None] = rpc.add_FederationServicer_to_server
    add(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0.0)
