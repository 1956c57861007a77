"""A relay between an agent and a server without TLS, which reads along: what a socket saw of the agent."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

_PREFACE = len(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
_DATA, _PADDED = 0, 8


@dataclass
class Relay:
    """Where it listens, and the bytes that came from agents, one buffer for each connection."""

    address: str
    came: list[bytearray] = field(default_factory=list)

    def streams(self) -> list[list[bytes]]:
        """The gRPC messages that agents sent, call by call."""
        return [stream for connection in self.came for stream in _streams(bytes(connection))]

    def messages(self) -> list[bytes]:
        """Every gRPC message that agents sent, whatever its type."""
        return [message for stream in self.streams() for message in stream]

    @property
    def everything(self) -> bytes:
        """All bytes, for those who look for something in them."""
        return b"".join(bytes(connection) for connection in self.came)


@contextmanager
def relay(server: str) -> Iterator[Relay]:
    """A relay to `server`, HOST:PORT, on a free port of loopback."""
    host, _, port = server.rpartition(":")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        made = Relay(f"127.0.0.1:{listener.getsockname()[1]}")
        threading.Thread(target=_accept, args=(listener, (host, int(port)), made), daemon=True).start()
        yield made


def _accept(listener: socket.socket, target: tuple[str, int], made: Relay) -> None:
    while True:
        try:
            agent, _ = listener.accept()
        except OSError:
            return
        made.came.append(bytearray())
        threading.Thread(target=_carry, args=(agent, target, made.came[-1]), daemon=True).start()


def _carry(agent: socket.socket, target: tuple[str, int], kept: bytearray) -> None:
    """One connection, both ways, until either side ends it."""
    with agent, socket.create_connection(target) as server:
        back = threading.Thread(target=_copy, args=(server, agent, None), daemon=True)
        back.start()
        _copy(agent, server, kept)
        back.join()


def _copy(source: socket.socket, sink: socket.socket, kept: bytearray | None) -> None:
    try:
        while data := source.recv(65536):
            if kept is not None:
                kept += data
            sink.sendall(data)
    except OSError:
        pass
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def _streams(connection: bytes) -> list[list[bytes]]:
    """The messages in one side of an HTTP/2 connection: DATA frames by stream, then gRPC's lengths."""
    streams: dict[int, bytearray] = {}
    place = _PREFACE
    while place + 9 <= len(connection):
        size = int.from_bytes(connection[place : place + 3], "big")
        kind, flags = connection[place + 3], connection[place + 4]
        stream = int.from_bytes(connection[place + 5 : place + 9], "big") & 0x7FFFFFFF
        body = connection[place + 9 : place + 9 + size]
        if kind == _DATA:
            padding = body[0] if flags & _PADDED else 0
            streams.setdefault(stream, bytearray()).extend(
                body[1 : size - padding] if flags & _PADDED else body
            )
        place += 9 + size
    found: list[list[bytes]] = []
    for data in streams.values():
        found.append([])
        at = 0
        while at < len(data):
            compressed, length = struct.unpack_from(">BI", data, at)
            assert not compressed
            found[-1].append(bytes(data[at + 5 : at + 5 + length]))
            at += 5 + length
    return found
