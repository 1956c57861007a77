"""A line between an agent and its server that delays, stalls and breaks, on loopback.

For `soak.py`; no question is answered here. Network namespaces with netem would do the same to packets, but
need a kernel that has it; a relay does it to streams, on every machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_PIECE = 64 * 1024
_RESET = struct.pack(
    "ii", 1, 0
)  # SO_LINGER that makes a close a reset: the other side learns of it by an error


class Line:
    """Everything that one agent and the server say to each other passes here.

    Attributes:
        port: of loopback, where the agent dials.
        delay_s: how long each piece is held back, at most; drawn anew for each.
        passed: bytes so far, both ways.
    """

    def __init__(self, server_port: int, rng: random.Random) -> None:
        self._server_port, self._rng = server_port, rng
        self._open: set[asyncio.StreamWriter] = set()
        self._stalled_until = 0.0
        self._server: asyncio.Server | None = None
        self.port = 0
        self.delay_s = 0.0
        self.passed = 0

    async def listen(self) -> None:
        """Begin to relay, on a free port."""
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """End what is open and listen no more."""
        if self._server is not None:
            self._server.close()
        self.cut()
        self.stall(0.0)

    def cut(self) -> None:
        """On the loop: reset what is open; the next connection goes through."""
        for writer in list(self._open):
            raw = writer.get_extra_info("socket")
            if raw is not None:
                with contextlib.suppress(OSError):
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()

    def stall(self, seconds: float) -> None:
        """Nothing passes for so long, and nobody is told: a sleeping laptop, a NAT that forgot."""
        self._stalled_until = time.monotonic() + seconds

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
        except OSError:  # the server is away
            writer.transport.abort()
            return
        self._open |= {writer, far_writer}
        try:
            await asyncio.gather(self._carry(reader, far_writer), self._carry(far_reader, writer))
        except OSError:
            pass
        finally:
            self._open -= {writer, far_writer}
            writer.transport.abort()
            far_writer.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(_PIECE):
            while (rest := self._stalled_until - time.monotonic()) > 0:
                await asyncio.sleep(rest)
            if self.delay_s:
                await asyncio.sleep(self._rng.uniform(0.0, self.delay_s))
            writer.write(piece)
            await writer.drain()
            self.passed += len(piece)
        writer.close()  # the other direction has nothing more to say to an end that has left


class Network:
    """Lines to one server, on an event loop of their own."""

    def __init__(self, loop: asyncio.AbstractEventLoop, lines: dict[str, Line]) -> None:
        self._loop, self.lines = loop, lines

    def cut(self, name: str) -> None:
        """See `Line.cut`."""
        self._loop.call_soon_threadsafe(self.lines[name].cut)

    def mend(self) -> None:
        """Be a good network from now on."""
        for line in self.lines.values():
            line.delay_s = 0.0
            line.stall(0.0)


@contextmanager
def network(server_port: int, names: tuple[str, ...], rng: random.Random) -> Iterator[Network]:
    """A line for each name, until the block ends."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="network", daemon=True)
    thread.start()
    lines = {name: Line(server_port, random.Random(rng.random())) for name in names}
    for line in lines.values():
        asyncio.run_coroutine_threadsafe(line.listen(), loop).result(10)
    try:
        yield Network(loop, lines)
    finally:
        asyncio.run_coroutine_threadsafe(_ended(loop, lines), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def _ended(loop: asyncio.AbstractEventLoop, lines: dict[str, Line]) -> None:
    for line in lines.values():
        await line.close()
    left = asyncio.all_tasks(loop) - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    await asyncio.sleep(0.1)  # transports close their sockets in a turn of their own
