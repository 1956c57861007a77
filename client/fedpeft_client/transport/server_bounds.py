"""What an agent takes from a server at all: bounds of every number, name and digest that one may say.

A server that goes beyond them is none of ours, or hostile: the session ends with a line that says what came,
and nothing of the message is acted on. Texts that only people read are cut instead.
"""

from __future__ import annotations

import asyncio
import time

from fedpeft.errors import FederationError
from fedpeft.v1 import federation_pb2 as pb
from fedpeft.wire.pace import LEAST_BYTES
from fedpeft.wire.session_bounds import (
    CHUNK_BYTES,
    DIGEST_BYTES,
    HEARTBEAT_MS,
    INLINE_BYTES,
    NAME_CHARACTERS,
    TASK_ID_BYTES,
)

MESSAGES_PER_S = 200  # of a session, down: more are left to wait where they are
_SHOWN = 1000  # characters of a text for people


def check_welcome(welcome: pb.Welcome) -> None:
    """Refuse a welcome with which no session works, or only one that wears the device out.

    Raises:
        FederationError: naming the number, what came and what is taken.
    """
    _check_number("heartbeat_ms", welcome.heartbeat_ms, HEARTBEAT_MS)
    _check_number("max_inline_bytes", welcome.max_inline_bytes, INLINE_BYTES)
    _check_number("chunk_bytes", welcome.chunk_bytes, CHUNK_BYTES)
    if len(welcome.name) > NAME_CHARACTERS or not welcome.name.isprintable():
        raise FederationError(
            f"the server calls this agent by a name of {len(welcome.name)} characters; {NAME_CHARACTERS}"
            " printable ones are the most: is it a fedpeft server?"
        )


def check_task(task: pb.Task, welcome: pb.Welcome) -> None:
    """Refuse a task whose names and digests are none that a server of ours makes.

    Raises:
        FederationError: naming the field, what came and what is taken.
    """
    _check_length("id", len(task.id), TASK_ID_BYTES)
    _check_length("run_digest", len(task.run_digest), DIGEST_BYTES)
    for field, text in (("run", task.run), ("kind", task.kind)):
        if len(text) > NAME_CHARACTERS:
            raise FederationError(
                f"a task came whose {field} has {len(text)} characters; {NAME_CHARACTERS} are the most"
            )
    if task.WhichOneof("body") == "blob":
        _check_length("blob.digest", len(task.blob.digest), DIGEST_BYTES)
    elif len(task.inline) > welcome.max_inline_bytes:
        raise FederationError(
            f"a task came with {len(task.inline)} bytes in the message, and the server said that"
            f" {welcome.max_inline_bytes} are the most"
        )


def check_piece(chunk: pb.BlobChunk, rest: int, welcome: pb.Welcome) -> None:
    """Refuse a piece of a blob that is smaller than any line needs, or more than there is to come.

    Args:
        rest: bytes that are to come.

    Raises:
        FederationError: naming its size.
    """
    least = min(rest, welcome.chunk_bytes, LEAST_BYTES)
    if not least <= len(chunk.data) <= rest:
        raise FederationError(
            f"a piece of {len(chunk.data)} bytes came of a blob; {least} to {rest} are taken here"
        )


def shorten(text: str) -> str:
    """Return a text for people as one line of bounded length."""
    line = " ".join(text[: 4 * _SHOWN].split())
    return line if len(line) <= _SHOWN else line[:_SHOWN] + "..."


class Flow:
    """Lets as many messages through in each second as a session needs; a server that sends more waits."""

    def __init__(self) -> None:
        self._began, self._count = time.monotonic(), 0

    async def step(self) -> None:
        """Count one message, and wait for the next second where this one has had its share."""
        self._count += 1
        left = self._began + 1.0 - time.monotonic()
        if left <= 0.0:
            self._began, self._count = time.monotonic(), 1
        elif self._count > MESSAGES_PER_S:
            await asyncio.sleep(left)


def _check_number(field: str, came: int, taken: range) -> None:
    if came not in taken:
        raise FederationError(
            f"the server says {field} = {came}; an agent takes {taken.start} to {taken.stop - 1}: set the"
            " server's limits anew, or check the address"
        )


def _check_length(field: str, came: int, needed: int) -> None:
    if came != needed:
        raise FederationError(f"a task came whose {field} has {came} bytes; {needed} are needed")
