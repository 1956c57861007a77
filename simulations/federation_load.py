"""Agents for `bench_federation.py --load`: the protocol and nothing else, many in one process.

They answer every task of a run with an update that was made beforehand: what is measured is the server.
Also the bare stream that uploads are compared with.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
from flwr.app import ConfigRecord, RecordDict

from fedpeft.config.run_file import build_run
from fedpeft.stages import stage_list
from fedpeft.transport.record_bytes import content_bytes
from fedpeft.transport.tasks import HELLO
from fedpeft.updates.update import Arrays, arrays_digest, layout_of
from fedpeft.v1 import federation_pb2 as pb
from fedpeft.v1 import federation_pb2_grpc as rpc
from fedpeft.wire.codec import Envelope, encode
from fedpeft_client.transport.dialing import error_of, open_channel
from fedpeft_client.transport.session import Session
from fedpeft_server.ops.malloc_arenas import limit_malloc_arenas
from fedpeft_server.transport.grpc_options import TransportOptions, server_channel_options

CHUNK = TransportOptions().chunk_bytes
if TYPE_CHECKING:  # it takes seconds to import
    from fedpeft.participant.loaded_run import LoadedRun

Answering = Callable[[pb.Task, int], tuple[bytes, bytes]]  # a body and its SHA-256


@dataclass(frozen=True)
class Answers:
    """What clients answer, in pairs of which one undoes the other: no round changes the state."""

    resident: LoadedRun
    state_digest: str
    update: Arrays

    @classmethod
    def of(cls, tables: dict[str, Any]) -> Answers:
        """Load the run as a server does, and draw an update that is as large as an honest one."""
        from fedpeft.participant.load_server import load_serving_run

        resident = load_serving_run(build_run(tables, source="bench"))
        state = resident.space.initial_state(resident.parameters)
        layout = resident.space.update_layout(layout_of(state))
        rng = np.random.default_rng(0)
        update = {
            name: rng.integers(-1000, 1000, shape).astype(kind)
            if np.issubdtype(np.dtype(kind), np.integer)
            else rng.normal(0.0, 1e-3, shape).astype(kind)
            for name, (shape, kind) in layout.items()
        }
        return cls(resident, arrays_digest(state), update)

    def hello(self, client: str) -> bytes:
        """The roll call's answer."""
        told = {"client": client, "examples": 1, "base-digest": self.resident.base_digest}
        return content_bytes(RecordDict({"hello": ConfigRecord(told)}))  # type: ignore[arg-type]  # its values vary

    def train(self, client: str, index: int, round_: int) -> bytes:
        """One client's update of one round."""
        sign = 1 if index % 2 else -1
        envelope = Envelope(
            arrays={name: (sign * array).astype(array.dtype) for name, array in self.update.items()},
            run_digest=self.resident.run_digest,
            round=round_,
            state_digest=self.state_digest,
            space=self.resident.space.kind,
            client=client,
            weight=1,
            metrics={"train_loss": 1.0},
            base_digest=self.resident.base_digest,
            stages=stage_list(self.resident.stages),
        )
        return content_bytes(RecordDict({"update": ConfigRecord({"payload": encode(envelope)})}))


def name_of(index: int) -> str:
    """A client's name; all are of one length, and so are their updates."""
    return f"agent-{index:04d}"


async def connect_agents(address: str, count: int, answer: Answering) -> list[asyncio.Task[None]]:
    """So many agents with a connection each, answering until they are cancelled."""
    ready: list[asyncio.Event] = [asyncio.Event() for _ in range(count)]
    agents = [asyncio.create_task(_agent(address, index, answer, ready[index])) for index in range(count)]
    for start in range(count):
        await asyncio.wait_for(ready[start].wait(), 120.0)
    return agents


async def _agent(address: str, index: int, answer: Answering, ready: asyncio.Event) -> None:
    errands: set[asyncio.Task[None]] = set()
    dial = functools.partial(open_channel, address, None)
    async with dial() as channel:
        link = await Session.open(channel, name_of(index), {}, dial)
        ready.set()
        try:
            async for message in link.messages():
                if message.WhichOneof("message") == "task":
                    errand = asyncio.create_task(_answer(link, message.task, index, answer))
                    errands.add(errand)
                    errand.add_done_callback(errands.discard)
        except grpc.aio.AioRpcError as error:
            print(f"{name_of(index)}: {error_of(error, address)}", file=sys.stderr)
        finally:
            link.close()


async def _answer(link: Session, task: pb.Task, index: int, answer: Answering) -> None:
    body, digest = answer(task, index)
    result = pb.Result(task=task.id)
    if len(body) <= link.welcome.max_inline_bytes:
        result.inline = body
    else:
        result.blob.CopyFrom(await link.push(task.id, body, digest))
    await link.send(pb.AgentMessage(result=result))


class Prepared:
    """Answers made before they are asked for, with their SHA-256: what is measured is the server."""

    def __init__(self, answers: Answers, count: int, rounds: int) -> None:
        self._answers = answers
        self._made = {
            (round_, index): _hash(answers.train(name_of(index), index, round_))
            for round_ in range(1, rounds + 1)
            for index in range(count)
        }

    def __call__(self, task: pb.Task, index: int) -> tuple[bytes, bytes]:
        """The answer to a task, and its digest."""
        if task.kind == HELLO:
            return _hash(self._answers.hello(name_of(index)))
        return self._made[task.round, index]


def _hash(body: bytes) -> tuple[bytes, bytes]:
    return body, hashlib.sha256(body).digest()


async def bare_upload_s(address: str, bodies: Sequence[bytes], at_a_time: int) -> float:
    """Seconds to stream bodies in chunks to a server that does nothing with them."""
    turns = asyncio.Semaphore(at_a_time)

    async def one(body: bytes) -> None:
        async with turns, open_channel(address, None) as channel:
            call = rpc.FederationStub(channel).PushBlob()  # type: ignore[no-untyped-call]  # generated
            for offset in range(0, len(body), CHUNK):
                chunk = pb.BlobChunk(offset=offset, data=body[offset : offset + CHUNK])
                await call.write(pb.BlobUpload(chunk=chunk))
            await call.done_writing()
            await call.read()

    began = time.perf_counter()
    await asyncio.gather(*(one(body) for body in bodies))
    return time.perf_counter() - began


class _Sink(rpc.FederationServicer):
    async def PushBlob(self, stream: AsyncIterator[pb.BlobUpload], context: Any) -> None:
        """Read to the end."""
        while isinstance(await context.read(), pb.BlobUpload):
            pass
        await context.write(pb.BlobProgress(complete=True))


async def _sink(ready: Path) -> None:
    """A server that reads and forgets, with the options of ours."""
    limit_malloc_arenas()
    server = grpc.aio.server(options=server_channel_options(TransportOptions()))
    rpc.add_FederationServicer_to_server(_Sink(), server)  # type: ignore[no-untyped-call]  # generated
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    ready.with_suffix(".new").write_text(str(port))
    ready.with_suffix(".new").rename(ready)
    await server.wait_for_termination()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_sink(Path(sys.argv[1])))
