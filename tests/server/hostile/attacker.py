"""A member of the federation who speaks the protocol by hand, and as it pleases."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from flwr.app import ConfigRecord, RecordDict

from fedpeft.credentials import Material, UpdateHeader, sign_update
from fedpeft.errors import LimitError
from fedpeft.transport.record_bytes import content_bytes, content_of
from fedpeft.transport.tasks import HELLO, Task
from fedpeft.v1 import federation_pb2 as pb
from fedpeft_client.transport.dialing import channel_credentials
from fedpeft_client.transport.session import Session
from tests.server.fleet import federation
from tests.server.hostile.apps import BASE
from tests.server.hostile.scene import Scene

OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_send_message_length", -1),
    ("grpc.http2.bdp_probe", 0),  # what is not read fills a small window soon
    ("grpc.http2.lookahead_bytes", 65536),
)
ENDINGS = (grpc.aio.AioRpcError, asyncio.InvalidStateError, asyncio.CancelledError, TimeoutError)
Answer = Callable[["Attacker", Session, pb.Task, Task], Awaitable[None]]


@dataclass
class Attacker:
    """One attacker with a certificate of its own.

    Attributes:
        begun: set by an attack that is under way and goes on beside the run.
        over: set when the run has ended.
    """

    scene: Scene
    name: str
    material: Material
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @asynccontextmanager
    async def channel(self, material: Material | None = None) -> AsyncIterator[grpc.aio.Channel]:
        """A connection of its own."""
        credentials = channel_credentials(material or self.material)
        async with grpc.aio.secure_channel(self.scene.running.address, credentials, OPTIONS) as channel:
            yield channel

    @asynccontextmanager
    async def stub(self) -> AsyncIterator[Any]:
        """The service's calls, unchecked."""
        async with self.channel() as channel:
            yield federation(channel)

    @asynccontextmanager
    async def linked(self, tasks: int = 0) -> AsyncIterator[tuple[Session, list[pb.Task], Any]]:
        """A session that has received so many tasks, and a stub on the same connection."""
        async with self.channel() as channel:
            link = await Session.open(channel, "", {})
            came: list[pb.Task] = []
            while len(came) < tasks:
                message = await link._call.read()
                if message.WhichOneof("message") == "task":
                    came.append(message.task)
            try:
                yield link, came, federation(channel)
            finally:
                link.close()

    def signature(self, task: pb.Task, body: bytes, **changes: Any) -> bytes:
        """Over the header that an honest agent would sign, or over a changed one."""
        fields: dict[str, Any] = {
            "run_id": task.run,
            "run_digest": task.run_digest.hex(),
            "round": task.round,
            "kind": task.kind,
            "client": self.name,
        }
        return sign_update(self.material.key, UpdateHeader(**(fields | changes)), body)

    async def send(self, link: Session, task: pb.Task, payload: bytes) -> None:
        """An update as an honest agent sends it: signed, and as a blob if it is large."""
        await self.deliver(link, task, update_body(payload))

    async def deliver(self, link: Session, task: pb.Task, body: bytes) -> None:
        """A result's content likewise, whatever is in it."""
        result = pb.Result(task=task.id, signature=self.signature(task, body))
        if len(body) <= link.welcome.max_inline_bytes:
            result.inline = body
        else:
            result.blob.CopyFrom(await self.pushed(link, task, body))
        await link.send(pb.AgentMessage(result=result))

    async def pushed(self, link: Session, task: pb.Task, body: bytes) -> pb.BlobRef:
        """A blob, over as many turns as it takes."""
        while True:
            with suppress(LimitError):
                return await link.push(task.id, body, hashlib.sha256(body).digest())

    async def declines(self, link: Session, task: pb.Task) -> None:
        """The task comes to nothing, so that its round need not wait."""
        failure = pb.Failure(code=pb.FAILURE_CODE_TRAINING)
        await link.send(pb.AgentMessage(result=pb.Result(task=task.id, failure=failure)))

    async def member(self, answer: Answer) -> None:
        """Be in the cohort: greet as one should, and answer each training task in one's own way."""
        while not self.over.is_set():
            with suppress(*ENDINGS):
                async with self.channel() as channel:
                    link = await Session.open(channel, "", {})
                    self.begun.set()
                    try:
                        async for message in link.messages():
                            if message.WhichOneof("message") == "task":
                                await self._answered(link, message.task, answer)
                    finally:
                        link.close()
            await asyncio.sleep(0.05)

    async def _answered(self, link: Session, task: pb.Task, answer: Answer) -> None:
        body = await link.pull(task.id, task.blob, bytearray()) if task.HasField("blob") else task.inline
        if task.kind == HELLO:
            hello: dict[str, Any] = {"client": self.name, "examples": 10, "base-digest": BASE}
            await self.deliver(link, task, content_bytes(RecordDict({"hello": ConfigRecord(hello)})))
            return
        state: Any = content_of(body, who="server").config_records["task"]["state"]
        await answer(self, link, task, Task(task.run_digest.hex(), task.round, bytes(state)))


def update_body(payload: bytes) -> bytes:
    """A result's content around an update's bytes."""
    return content_bytes(RecordDict({"update": ConfigRecord({"payload": payload})}))


def pieces(body: bytes, size: int) -> list[pb.BlobUpload]:
    """Chunks of an upload."""
    return [
        pb.BlobUpload(
            chunk=pb.BlobChunk(offset=at, data=body[at : at + size], crc32=zlib.crc32(body[at : at + size]))
        )
        for at in range(0, len(body), size)
    ]


async def ended(call: Any) -> tuple[grpc.StatusCode, str]:
    """Read a call to its end; how it ended."""
    with suppress(*ENDINGS):
        while await call.read() is not grpc.aio.EOF:
            pass
    return await call.code(), await call.details()


def named(case: str, quick: Collection[str]) -> Any:
    """A case for `parametrize`: slow unless it is one of the quick ones."""
    return pytest.param(case, marks=() if case in quick else pytest.mark.slow)


_NAMES = itertools.count()


def new_name(what: str) -> str:
    """A name that no other attacker has, so that each has a share of its own."""
    return f"{what[:40]}-{next(_NAMES)}"
