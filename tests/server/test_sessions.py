"""Connections that misbehave: each is ended, and an honest agent's work goes on."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fedpeft.errors import FederationError, UsageError
from fedpeft.v1 import federation_pb2 as pb
from fedpeft.wire.protocol import NEWEST_PROTOCOL
from fedpeft_client.transport.session import Session
from fedpeft_server.store.memory_store import MemoryAcceptor, MemoryBlobs
from fedpeft_server.transport.grpc_options import TransportOptions
from fedpeft_server.transport.serving import RunningServer, serve
from tests.server.fleet import RUN, answer, collected, federation, fleet, messages, played, server, wait_for

ALONE = (("grpc.use_local_subchannel_pool", 1),)  # a connection of its own
Behaviour = Callable[[Any], Awaitable[None]]  # what a stranger does with its session


@pytest.fixture(scope="module")
def running() -> Iterator[RunningServer]:
    with server(heartbeat_s=0.3, hello_s=0.5, stall_s=0.5) as started:
        yield started


def hello(name: str, version: int = NEWEST_PROTOCOL) -> pb.AgentMessage:
    return pb.AgentMessage(hello=pb.Hello(protocol_version=version, name=name))


async def status_of(address: str, behaviour: Behaviour) -> tuple[grpc.StatusCode, str]:
    """How the server ended a session."""
    async with grpc.aio.insecure_channel(address, options=ALONE) as channel:
        call = federation(channel).Session()
        try:
            await behaviour(call)
            while await call.read() is not grpc.aio.EOF:
                pass
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass
        return await call.code(), await call.details()


def ended(running: RunningServer, behaviour: Behaviour) -> tuple[grpc.StatusCode, str]:
    return played(status_of(running.address, behaviour))


async def old_version(call: Any) -> None:
    await call.write(hello("stranger", version=1))


async def bad_name(call: Any) -> None:
    await call.write(hello("../../etc"))


async def no_hello(call: Any) -> None:
    await call.write(pb.AgentMessage(heartbeat=pb.Heartbeat()))


async def silent(call: Any) -> None: ...


async def silent_later(call: Any) -> None:
    await call.write(hello("stranger"))


async def two_hellos(call: Any) -> None:
    await call.write(hello("stranger"))
    await call.write(hello("stranger"))


async def huge(call: Any) -> None:
    await call.write(hello("stranger"))
    await call.write(pb.AgentMessage(result=pb.Result(task=b"t" * 16, inline=b"x" * 1_000_000)))


async def talkative(call: Any) -> None:
    await call.write(
        pb.AgentMessage(
            hello=pb.Hello(
                protocol_version=NEWEST_PROTOCOL,
                name="stranger",
                capabilities={str(number): "x" * 50 for number in range(100)},
            )
        )
    )


CODE = grpc.StatusCode
CASES: dict[str, tuple[Behaviour, grpc.StatusCode, str]] = {
    "old-version": (
        old_version,
        CODE.FAILED_PRECONDITION,
        "protocol version 1 came and this server speaks 3; update fedpeft at the agent",
    ),
    "bad-name": (bad_name, CODE.UNAUTHENTICATED, "cannot be used"),
    "no-hello": (no_hello, CODE.INVALID_ARGUMENT, "a session begins with a hello"),
    "silent": (silent, CODE.DEADLINE_EXCEEDED, "stalled"),
    "silent-later": (silent_later, CODE.DEADLINE_EXCEEDED, "stalled"),
    "two-hellos": (two_hellos, CODE.INVALID_ARGUMENT, "a hello came in the middle"),
    "huge": (huge, CODE.INVALID_ARGUMENT, "a message of 1000026 bytes came, at most 131072"),
    "talkative": (talkative, CODE.INVALID_ARGUMENT, "too many capabilities"),
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_misbehaviour_ends_the_session_with_its_reason(running: RunningServer, name: str) -> None:
    behaviour, code, words = CASES[name]
    came, details = ended(running, behaviour)
    assert came is code
    assert words in details
    assert "\n" not in details


def test_bytes_that_are_no_message(running: RunningServer) -> None:
    async def garbage() -> grpc.StatusCode:
        async with grpc.aio.insecure_channel(running.address) as channel:
            call = channel.stream_stream(
                "/fedpeft.v1.Federation/Session", request_serializer=lambda raw: raw
            )()
            await call.write(b"\xff\xff\xff\xff not protobuf")
            return await call.code()

    assert played(garbage()) is not CODE.OK


def test_an_honest_agents_round_ends_beside_strangers(running: RunningServer, tmp_path: Path) -> None:
    """A slow reader, a name thief's noise and a flood of connections in the middle of a round."""

    async def strangers() -> None:
        await asyncio.gather(*(status_of(running.address, CASES[name][0]) for name in sorted(CASES) * 3))

    with fleet(running.address, ["honest"], tmp_path):
        grid = running.grid(RUN)
        wait_for(lambda: grid.agents_here == ["honest"])
        ids = list(grid.push_messages(messages(grid, ["honest"], b"sleep:0.5")))
        played(strangers())
        assert answer(collected(grid, ids)[0])["client"] == "honest"


def test_a_slow_reader_is_let_go(running: RunningServer) -> None:
    """It says hello and heartbeats, and never reads; tasks of 64 KiB fill the window of its connection."""

    grid = running.grid(RUN)

    async def slow() -> None:
        async with grpc.aio.insecure_channel(running.address) as channel:
            call = federation(channel).Session()
            await call.write(hello("slow"))
            while "slow" not in grid.agents_here:
                await asyncio.sleep(0.01)
            while "slow" in grid.agents_here:
                await call.write(pb.AgentMessage(heartbeat=pb.Heartbeat()))
                await asyncio.sleep(0.05)

    for number in range(100):
        grid.push_messages(messages(grid, ["slow"], bytes([number]) * 60_000))
    played(slow())
    grid.stop(FederationError("done"))


def test_a_second_machine_with_the_same_key_is_refused_while_the_first_answers(
    running: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    async def both() -> tuple[str, bool]:
        async with (
            grpc.aio.insecure_channel(running.address) as one,
            grpc.aio.insecure_channel(running.address, options=ALONE) as two,
        ):
            first = await Session.open(one, "twin", {})
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await Session.open(two, "twin", {})
            task = asyncio.ensure_future(anext(first.messages()))  # a heartbeat: its session goes on
            kept = (await task).WhichOneof("message") == "heartbeat"
            await first.leave()
            second = await Session.open(two, "twin", {})  # nobody answers any more
            second.close()
            return refused.value.details() or "", kept

    said, kept = played(both())
    assert kept
    assert re.fullmatch(
        r"LimitError: twin is connected from ipv\d:\S+:\d+ and answers, and a second machine with its key"
        r" came from ipv\d:\S+:\d+; end one .*",
        said,
    )
    assert running.refusals.totals()["twice"] == 1
    assert any("a second machine with its key" in record.getMessage() for record in caplog.records)


def test_a_session_that_died_without_a_word_makes_way(running: RunningServer) -> None:
    """Its connection is open, and nobody is behind it: as after a power cut."""

    async def both() -> tuple[str, float]:
        async with (
            grpc.aio.insecure_channel(running.address) as one,
            grpc.aio.insecure_channel(running.address, options=ALONE) as two,
        ):
            dead = federation(one).Session()
            await dead.write(hello("twin"))
            assert (await dead.read()).WhichOneof("message") == "welcome"
            began = time.monotonic()
            second = await Session.open(two, "twin", {})
            took = time.monotonic() - began
            goodbye = await dead.read()
            second.close()
            return goodbye.goodbye.reason, took

    reason, took = played(both())
    assert "took its place" in reason
    assert took < 5.0


def test_common_tools_can_ask_what_is_here_and_whether_it_is_well(running: RunningServer) -> None:
    with grpc.insecure_channel(running.address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service="fedpeft.v1.Federation")
        )
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (listed,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]))
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    names = {service.name for service in listed.list_services_response.service}
    assert names == {
        "fedpeft.v1.Federation",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


def test_a_port_in_use_and_plaintext_for_others_are_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(FederationError, match=f"127.0.0.1:{port} cannot be listened on"):
            serve(TransportOptions(port=port), MemoryAcceptor(), MemoryBlobs())
    with pytest.raises(UsageError, match="would be plaintext"):
        serve(TransportOptions(host="0.0.0.0"), MemoryAcceptor(), MemoryBlobs())


def test_agents_know_when_the_server_stops(tmp_path: Path) -> None:
    with server() as started:
        with fleet(started.address, ["site-a"], tmp_path):
            wait_for(lambda: started.grid(RUN).agents_here)
            began = time.monotonic()
            started.disconnect("site-a", "maintenance")
            wait_for(lambda: started.agents()[0].sessions == 2)
            assert time.monotonic() - began < 5.0
        status = json.loads((tmp_path / "site-a" / "status.json").read_text())
    assert status["state"] == "stopped"
