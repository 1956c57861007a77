"""Attacks on the transport beside a run: its rounds end as without them, and the refusals are counted."""

from __future__ import annotations

import asyncio
import hashlib
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedpeft.credentials import (
    Identity,
    Material,
    Role,
    create_authority,
    make_request,
    new_key,
    visitor_material,
)
from fedpeft.credentials.certificates import parse_certificate
from fedpeft.v1 import federation_pb2 as pb
from fedpeft.wire.content import encode_content
from fedpeft.wire.protocol import NEWEST_PROTOCOL
from fedpeft_server.transport.grpc_event_loop import get_grpc_event_loop
from fedpeft_server.transport.refusals import NOBODY, Reason
from tests.server.fleet import federation, played, wait_for
from tests.server.hostile.attacker import ENDINGS, Attacker, ended, named, new_name, pieces
from tests.server.hostile.scene import PATIENCE_S, Scene, counted

Attack = Callable[[Attacker], Awaitable[None]]
HELLO = pb.AgentMessage(hello=pb.Hello(protocol_version=NEWEST_PROTOCOL))
BEAT = pb.AgentMessage(heartbeat=pb.Heartbeat())
CODE = grpc.StatusCode


def body_of(self: Attacker) -> bytes:
    """Sixty kilobytes that nobody else sends."""
    return encode_content({"update": {"payload": hashlib.sha256(self.name.encode()).digest() * 2000}})


def opened(task: pb.Task, body: bytes, size: int = 0) -> pb.BlobUpload:
    digest = hashlib.sha256(body).digest()
    return pb.BlobUpload(open=pb.BlobOpen(digest=digest, size=size or len(body), task=task.id))


async def stalled(self: Attacker) -> None:
    """Wait until the server has noticed."""
    while not counted(self.scene.running, self.name).get(Reason.STALLED):
        await asyncio.sleep(0.02)


async def slow_reader(self: Attacker) -> None:
    """Asks for a large body and reads none of it, with as many calls as it may."""
    async with self.linked(1) as (_, tasks, stub):
        request = pb.PullBlobRequest(digest=tasks[0].blob.digest, task=tasks[0].id)
        calls = [stub.PullBlob(request) for _ in range(4)]
        self.begun.set()
        await stalled(self)
        for call in calls:
            call.cancel()


async def slow_session(self: Attacker) -> None:
    """Has a session with many tasks, says something now and then and reads nothing."""
    async with self.channel() as channel:
        call = federation(channel).Session()
        await call.write(HELLO)
        self.begun.set()
        with suppress(*ENDINGS):
            while not counted(self.scene.running, self.name).get(Reason.STALLED):
                await call.write(BEAT)
                await asyncio.sleep(0.2)


async def slow_writer(self: Attacker) -> None:
    """Sends a byte now and then, never so slowly that it stalls, in the only place that there is."""
    async with self.linked(1) as (_, tasks, stub):
        call = stub.PushBlob()
        await call.write(opened(tasks[0], body_of(self)))
        await call.read()
        self.begun.set()
        with suppress(*ENDINGS):
            for piece in pieces(body_of(self), 1):
                await call.write(piece)
                await asyncio.sleep(0.05)
        assert (await ended(call))[0] is not CODE.OK


async def silent_writer(self: Attacker) -> None:
    """Takes the only place and sends nothing."""
    async with self.linked(1) as (_, tasks, stub):
        call = stub.PushBlob()
        await call.write(opened(tasks[0], body_of(self)))
        await call.read()
        self.begun.set()
        assert (await ended(call))[0] is CODE.DEADLINE_EXCEEDED


async def giant(self: Attacker) -> None:
    """A little too large, and far too large, in every call that takes a stream."""
    for size in (200_000, 8_000_000):
        async with self.linked(1) as (link, tasks, stub):
            body = b"x" * size
            with suppress(*ENDINGS):
                await link._call.write(pb.AgentMessage(result=pb.Result(task=tasks[0].id, inline=body)))
            assert (await ended(link._call))[0] is not CODE.OK
            call = stub.PushBlob()
            await call.write(opened(tasks[0], body_of(self)))
            with suppress(*ENDINGS):
                await call.write(pb.BlobUpload(chunk=pb.BlobChunk(data=body)))
            assert (await ended(call))[0] is not CODE.OK


async def too_large_a_result(self: Attacker) -> None:
    async with self.linked(1) as (_, tasks, stub):
        call = stub.PushBlob()
        await call.write(opened(tasks[0], b"", size=1 << 40))
        assert "was announced, this run takes" in (await call.read()).refused


async def malformed(self: Attacker) -> None:
    """Bytes that are no message, to every method of every service."""
    async with self.channel() as channel:
        place = f"/{pb.DESCRIPTOR.package}.Federation"
        for method in ("Session", "PushBlob"):
            call = channel.stream_stream(f"{place}/{method}")()
            with suppress(*ENDINGS):
                await call.write(b"\xff\xff\xff no protobuf")
            assert (await ended(call))[0] is CODE.INVALID_ARGUMENT
        pull = channel.unary_stream(f"{place}/PullBlob")(b"\xff\xff\xff")
        assert await pull.code() is CODE.INVALID_ARGUMENT
        enrol = channel.unary_unary(f"{place}/Enroll")(b"\xff\xff\xff")
        assert await enrol.code() is CODE.INVALID_ARGUMENT


async def out_of_order(self: Attacker) -> None:
    """Messages that come where they don't belong."""
    for first in (BEAT, HELLO):
        async with self.stub() as stub:
            call = stub.Session()
            with suppress(*ENDINGS):
                await call.write(first)
                await call.write(HELLO)
            assert (await ended(call))[0] is CODE.INVALID_ARGUMENT


async def gzip_bomb(self: Attacker) -> None:
    """Thirty megabytes in thirty kilobytes, unpacked by whoever believes gRPC's own compression."""
    async with self.linked() as (_, _, stub):
        call = stub.PushBlob(compression=grpc.Compression.Gzip)
        with suppress(*ENDINGS):
            await call.write(pb.BlobUpload(chunk=pb.BlobChunk(data=bytes(30_000_000))))
        assert (await ended(call))[0] is not CODE.OK
        call = stub.Session(compression=grpc.Compression.Gzip)
        with suppress(*ENDINGS):
            await call.write(pb.AgentMessage(hello=pb.Hello(name="a" * 10_000)))
        assert (await ended(call))[0] is not CODE.OK


async def half_closed(self: Attacker) -> None:
    """Streams whose one side ends before anything, in the middle, and after a session has begun."""
    async with self.linked(1) as (link, tasks, stub):
        for messages in (
            [],
            [opened(tasks[0], body_of(self))],
            [opened(tasks[0], body_of(self)), *pieces(body_of(self), 8192)[:3]],
        ):
            call = stub.PushBlob()
            for message in messages:
                await call.write(message)
            await call.done_writing()
            assert (await ended(call))[0] is CODE.INVALID_ARGUMENT
        await link._call.done_writing()
        assert (await ended(link._call))[0] is CODE.OK
        call = stub.Session()
        await call.done_writing()
        assert (await ended(call))[0] is CODE.INVALID_ARGUMENT


async def flood(self: Attacker) -> None:
    """Messages as fast as they go, whose answers nobody reads."""
    async with self.linked() as (link, _, _):
        self.begun.set()
        with suppress(*ENDINGS):
            for _ in range(5000):
                await link._call.write(BEAT)
        assert (await ended(link._call))[0] is not CODE.OK


async def reconnects(self: Attacker, times: int = 60) -> None:
    """Connections that come, say hello and go, one after the other."""
    self.begun.set()
    for _ in range(times):
        async with self.stub() as stub:
            call = stub.Session()
            with suppress(*ENDINGS):
                await call.write(HELLO)
                await call.read()
            call.cancel()


async def many_streams(self: Attacker) -> None:
    """Every call that it can open, on several connections."""
    async with self.linked(1) as (_, tasks, one), self.stub() as two, self.stub() as three:
        calls = [stub.PushBlob() for stub in (one, two, three) for _ in range(5)]
        with suppress(*ENDINGS):
            for call in calls:
                await call.write(opened(tasks[0], body_of(self)))
        self.begun.set()
        most = self.scene.max_streams
        while counted(self.scene.running, self.name).get(Reason.STREAMS, 0) < len(calls) + 1 - most:
            await asyncio.sleep(0.02)
        await self.over.wait()
        for call in calls:
            call.cancel()


async def gluttony(self: Attacker) -> None:
    """Fetches the same large body again and again."""
    async with self.linked(1) as (link, tasks, _):

        async def fetched(times: int) -> None:
            for _ in range(times):
                await link.pull(tasks[0].id, tasks[0].blob, bytearray())

        with pytest.raises(grpc.aio.AioRpcError, match="MiB an hour are accepted of one caller"):
            await fetched(20)


async def litter(self: Attacker) -> None:
    """Uploads one content after the other for one task, to fill the disk."""
    async with self.linked(1) as (_, tasks, stub):
        said = []
        for number in range(5):
            body = encode_content({"update": {"payload": bytes([number]) * 20_000}})
            call = stub.PushBlob()
            await call.write(opened(tasks[0], body))
            progress = await call.read()
            said.append(progress.refused)
            if not progress.refused:
                for piece in pieces(body, 8192):
                    await call.write(piece)
                assert (await call.read()).complete
            await call.done_writing()
        assert [bool(line) for line in said] == [False, False, True, True, True]


async def incorrigible(self: Attacker) -> None:
    """So much that is wrong that nothing more is heard."""
    async with self.channel() as channel:
        place = f"/{pb.DESCRIPTOR.package}.Federation/PullBlob"
        codes = [await channel.unary_stream(place)(b"\xff\xff").code() for _ in range(15)]
        assert codes.count(CODE.INVALID_ARGUMENT) == 10
        assert codes[-5:] == [CODE.RESOURCE_EXHAUSTED] * 5


async def in_anothers_name(self: Attacker) -> None:
    async with self.stub() as stub:
        call = stub.Session()
        await call.write(pb.AgentMessage(hello=pb.Hello(protocol_version=NEWEST_PROTOCOL, name="ada")))
        code, details = await ended(call)
        assert code is CODE.UNAUTHENTICATED
        assert "its certificate" in details


async def persons_work(self: Attacker) -> None:
    """An agent's certificate for what only people may do: it has no such service here, nor the role."""
    async with self.channel() as channel:
        call = federation(channel).Enroll(
            pb.EnrollRequest(protocol_version=NEWEST_PROTOCOL, csr=make_request(new_key()))
        )
        assert "can be renewed from" in (await call.details())


async def stolen_token(self: Attacker) -> None:
    """A token that its device has used, brought again with another key, and one that was made up."""
    authority, now = self.scene.authority, datetime.now(UTC)
    token = authority.tokens.invite(Identity(f"dev-{self.name}", Role.AGENT), now, timedelta(hours=1))
    visitor = visitor_material(authority.certificate)
    made_up = ".".join((token.split(".")[0], "A" * 43, token.split(".")[2]))
    async with self.channel(visitor) as channel:
        stub = federation(channel)

        def ask(text: str) -> Any:
            return stub.Enroll(
                pb.EnrollRequest(protocol_version=NEWEST_PROTOCOL, token=text, csr=make_request(new_key()))
            )

        assert (await ask(token)).name == f"dev-{self.name}"
        assert "used before, by another device" in await ask(token).details()
        assert "not known here" in await ask(made_up).details()


async def anothers_certificate(self: Attacker) -> None:
    """Another's certificate is public: without its key there is no handshake."""
    ada = self.scene.authority.holds("ada", datetime.now(UTC))[0]
    with suppress(*ENDINGS, grpc.aio.UsageError):
        async with self.channel(Material(new_key(), ada, self.scene.authority.certificate)) as channel:
            call = federation(channel).Session()
            assert await asyncio.wait_for(call.code(), 5.0) is not CODE.OK


async def foreign_authority(self: Attacker) -> None:
    """A certificate with the right name from an authority of the attacker's own."""
    folder = Path(self.scene.store.folder) / f"foreign-{self.name}"
    other = create_authority(folder, datetime.now(UTC))
    key = new_key()
    issued = other.device(key.public_key(), Identity("ada", Role.AGENT), datetime.now(UTC))
    material = Material(key, parse_certificate(issued, "test"), self.scene.authority.certificate)
    async with self.channel(material) as channel:
        call = federation(channel).Session()
        with suppress(*ENDINGS):
            await call.write(HELLO)
        assert (await ended(call))[0] is CODE.UNAVAILABLE


async def revoked(self: Attacker) -> None:
    """A session that is open while its certificate is revoked, and every one after it."""
    async with self.linked() as (link, _, stub):
        self.scene.authority.revoke(self.name, datetime.now(UTC))
        with suppress(*ENDINGS):
            await link._call.write(BEAT)
        assert (await ended(link._call))[0] is CODE.UNAUTHENTICATED
        call = stub.Session()
        with suppress(*ENDINGS):
            await call.write(HELLO)
        assert (await ended(call))[0] is CODE.UNAUTHENTICATED


async def mute_connections(self: Attacker) -> None:
    """Connections without a word: they cost a descriptor, for as long as a handshake may take."""
    host, _, port = self.scene.running.address.rpartition(":")
    sockets = [socket.create_connection((host, int(port))) for _ in range(100)]
    self.begun.set()
    for one in sockets:
        one.setblocking(False)
        with suppress(ConnectionResetError):
            await asyncio.wait_for(asyncio.get_running_loop().sock_recv(one, 1), PATIENCE_S)
        one.close()


@dataclass(frozen=True)
class Case:
    """An attack, what is counted for it, under its own name or as nobody's, and the tasks that it needs."""

    attack: Attack
    reasons: tuple[Reason, ...]
    name: str | None = None
    bait: Sequence[int] = ()


R = Reason
CASES = {
    "slow reader of a body": Case(slow_reader, (R.STALLED,), bait=[900_000]),
    "slow reader of its session": Case(slow_session, (R.STALLED,), bait=[3500] * 100),
    "slow writer": Case(slow_writer, (R.TURN,), bait=[10]),
    "silent writer": Case(silent_writer, (R.STALLED,), bait=[10]),
    "giant messages": Case(giant, (R.TOO_LARGE, R.BROKEN_OFF), bait=[10]),
    "giant announced": Case(too_large_a_result, (R.TOO_LARGE,), bait=[10]),
    "malformed protobuf": Case(malformed, (R.MALFORMED,)),
    "messages out of order": Case(out_of_order, (R.MALFORMED,)),
    "gzip bomb": Case(gzip_bomb, (R.BROKEN_OFF,)),
    "half-closed streams": Case(half_closed, (R.BROKEN_OFF, R.MALFORMED), bait=[10]),
    "flood of messages": Case(flood, (R.RATE,)),
    "reconnects": Case(reconnects, (R.RATE,)),
    "too many streams": Case(many_streams, (R.STREAMS,), bait=[10]),
    "too many bytes": Case(gluttony, (R.QUOTA,), bait=[900_000]),
    "litter": Case(litter, (R.QUOTA,), bait=[10]),
    "incorrigible": Case(incorrigible, (R.MALFORMED, R.QUOTA)),
    "in another's name": Case(in_anothers_name, (R.CALLER,)),
    "renewed too early": Case(persons_work, (R.CALLER,)),
    "stolen token": Case(stolen_token, (R.TOKEN,), name=NOBODY),
    "revoked": Case(revoked, (R.CALLER,)),
    # What ends in the handshake is never heard of by us; gRPC says it in its own log.
    "another agent's certificate": Case(anothers_certificate, ()),
    "foreign authority": Case(foreign_authority, ()),
    "mute connections": Case(mute_connections, ()),
}


async def _run(attack: Attack, attacker: Attacker) -> None:
    await attack(attacker)


QUICK = {  # one of each kind; the others are for the tests that take longer
    "slow reader of a body",
    "slow writer",
    "giant messages",
    "malformed protobuf",
    "gzip bomb",
    "half-closed streams",
    "reconnects",
    "too many streams",
    "stolen token",
    "another agent's certificate",
    "in another's name",
    "revoked",
}


def attacked(scene: Scene, case: Case, what: str, patience_s: float = PATIENCE_S) -> tuple[str, str]:
    """The digest in which a run ends beside an attack that is under way, and the attacker's name."""
    name = new_name(what.replace(" ", "-").replace("'", ""))

    async def made() -> Attacker:
        return Attacker(scene, name, scene.device(name))

    attacker = played(made())
    with ExitStack() as stack:
        if case.bait:
            stack.enter_context(scene.bait(name, list(case.bait)))
        under_way = asyncio.run_coroutine_threadsafe(_run(case.attack, attacker), get_grpc_event_loop())
        wait_for(lambda: attacker.begun.is_set() or under_way.done(), PATIENCE_S)
        digest = scene.hold()
        get_grpc_event_loop().call_soon_threadsafe(attacker.over.set)
        under_way.result(patience_s)
    return digest, name


@pytest.mark.parametrize("what", [named(what, QUICK) for what in sorted(CASES)])
def test_the_honest_round_ends_in_the_same_bytes(plain: Scene, undisturbed: str, what: str) -> None:
    case = CASES[what]
    digest, name = attacked(plain, case, what)
    assert digest == undisturbed
    for reason in case.reasons:
        who = name if case.name is None else case.name
        wait_for(lambda who=who, reason=reason: counted(plain.running, who).get(reason, 0), PATIENCE_S)  # type: ignore[misc]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_ten_thousand_reconnects(plain: Scene, undisturbed: str) -> None:
    case = Case(lambda attacker: reconnects(attacker, 10_000), (Reason.RATE,))
    digest, name = attacked(plain, case, "ten-thousand", patience_s=1800.0)
    assert digest == undisturbed
    assert counted(plain.running, name)[Reason.RATE] > 9000
