"""What hostile agents make a server's memory grow by: so much for each of them, and no more with time."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedpeft.v1 import federation_pb2 as pb
from fedpeft.wire.protocol import NEWEST_PROTOCOL
from fedpeft_client.transport.dialing import open_channel
from fedpeft_server.transport.grpc_options import TransportOptions
from tests.server.fleet import federation, played, wait_for

ROOT = Path(__file__).resolve().parents[3]
OPTIONS = TransportOptions()
AGENTS, WAVES, LASTING_S = 20, 4, 4.0
MOST_MIB = 4  # of each, in one name; what 16 chunks that nobody asked for would take is 32
ENDINGS = (grpc.aio.AioRpcError, asyncio.InvalidStateError)


@contextmanager
def daemon(folder: Path) -> Iterator[tuple[str, int]]:
    """`fedpeft server`: its address and its process."""
    words = ["server", "--insecure", "--listen", "127.0.0.1:0", "--state", str(folder / "state")]
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "server", "client"))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "fedpeft.cli", *words],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": paths},
            stderr=log,
        )
    try:
        wait_for(lambda: "listening on" in (folder / "log").read_text() or process.poll(), 120)
        (address,) = re.findall(r"listening on (\S+:\d+)", (folder / "log").read_text())
        yield address, process.pid
    finally:
        process.kill()
        process.wait()


def kib(pid: int, field: str) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{field}:"))


async def giant_messages(stub: Any, name: str) -> None:
    """As large as gRPC lets through, in every call that takes a stream, as many as one agent may have."""
    body = bytes(OPTIONS.max_received_bytes - 4096)
    calls = [stub.PushBlob(metadata=(("fedpeft-agent", name),)) for _ in range(OPTIONS.max_streams - 1)]
    for call in calls:
        with suppress(*ENDINGS):
            await call.write(pb.BlobUpload(chunk=pb.BlobChunk(data=body)))
    session = stub.Session()
    with suppress(*ENDINGS):
        await session.write(pb.AgentMessage(hello=hello(name)))
        await session.write(pb.AgentMessage(result=pb.Result(task=bytes(16), inline=body)))
    for call in (*calls, session):
        with suppress(*ENDINGS):
            await call.code()


async def half_messages(stub: Any, name: str) -> None:
    """The largest chunks that are accepted, of which nobody reads the answer, then silence."""
    chunk = pb.BlobChunk(data=bytes(OPTIONS.chunk_bytes))
    calls = [stub.PushBlob(metadata=(("fedpeft-agent", name),)) for _ in range(OPTIONS.max_streams)]
    for call in calls:
        with suppress(*ENDINGS):
            await call.write(pb.BlobUpload(chunk=chunk))
    await asyncio.sleep(1.0)
    for call in calls:
        call.cancel()


async def many_sessions(stub: Any, name: str) -> None:
    """Sessions in one name, each of which says as much of itself as it may, and reads nothing."""
    calls = [stub.Session() for _ in range(4 * OPTIONS.max_streams)]
    for call in calls:
        with suppress(*ENDINGS):
            await call.write(pb.AgentMessage(hello=hello(name, {"k": "v" * 4000})))
    await asyncio.sleep(1.0)
    for call in calls:
        call.cancel()


def hello(name: str, capabilities: dict[str, str] | None = None) -> pb.Hello:
    return pb.Hello(protocol_version=NEWEST_PROTOCOL, name=name, capabilities=capabilities or {})


ATTACKS: dict[str, Callable[[Any, str], Awaitable[None]]] = {
    "giant messages": giant_messages,
    "half messages": half_messages,
    "many sessions": many_sessions,
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux: memory is read from /proc")
@pytest.mark.parametrize(
    "attack",
    [
        name if name == "giant messages" else pytest.param(name, marks=pytest.mark.exhaustive)
        for name in sorted(ATTACKS)
    ],
)
def test_memory_grows_by_a_bounded_share_for_each_and_not_with_time(tmp_path: Path, attack: str) -> None:
    async def one(address: str, name: str) -> None:
        async with open_channel(address, None) as channel:
            with suppress(TimeoutError):
                async with asyncio.timeout(LASTING_S):
                    await ATTACKS[attack](federation(channel), name)

    async def wave(address: str) -> None:
        await asyncio.gather(*(one(address, f"bad-{number}") for number in range(AGENTS)))

    with daemon(tmp_path) as (address, pid):
        before, peaks = kib(pid, "VmRSS"), []
        for _ in range(WAVES):
            played(wave(address), 120)
            peaks.append((kib(pid, "VmHWM") - before) / 1024)
    print(f"{attack}: {AGENTS} agents, MiB above {before / 1024:.0f} after each wave: {peaks}")
    assert max(peaks) < MOST_MIB * AGENTS
    assert peaks[-1] - peaks[1] < 2 * AGENTS
