"""Agents in one thread of the test's own process, and messages to them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc
from flwr.app import Message

from fedpeft.transport.tasks import TRAIN, Task, task_content
from fedpeft.v1 import federation_pb2_grpc as rpc
from fedpeft_client.agent import Agent
from fedpeft_client.client_settings import ClientSettings
from fedpeft_client.policy.owner_policy import Policy
from fedpeft_client.workers.in_process_worker import InlineWorkshop
from fedpeft_client.workers.worker_process import CLIENT_APP
from fedpeft_server.store.contracts import Acceptor, BlobStore
from fedpeft_server.store.memory_store import MemoryAcceptor, MemoryBlobs
from fedpeft_server.transport.grpc_event_loop import get_grpc_event_loop
from fedpeft_server.transport.grpc_grid import GrpcGrid, RunIdentity, node_id
from fedpeft_server.transport.grpc_options import TransportOptions
from fedpeft_server.transport.serving import RunningServer, serve

Result = TypeVar("Result")

APP = "tests.server.apps:app"
RUN = RunIdentity("run-1", "ab" * 32)


@contextmanager
def server(
    acceptor: Acceptor | None = None,
    blobs: BlobStore | None = None,
    trouble: Callable[[str | None], None] = lambda line: None,
    **options: Any,
) -> Iterator[RunningServer]:
    """A server on a free port of loopback."""
    running = serve(
        TransportOptions(**{"drain_s": 0.5, **options}),
        acceptor or MemoryAcceptor(),
        blobs or MemoryBlobs(),
        trouble=trouble,
    )
    try:
        yield running
    finally:
        running.stop()


def played(work: Coroutine[Any, Any, Result], seconds: float = 20.0) -> Result:
    """A coroutine's result, on the server's own loop."""
    return asyncio.run_coroutine_threadsafe(work, get_grpc_event_loop()).result(seconds)


@contextmanager
def fleet(
    address: str,
    names: Sequence[str],
    home: Path,
    *,
    policy: Policy | None = None,
    processes: bool = False,
    app: str = APP,
) -> Iterator[dict[str, Agent]]:
    """Running agents by name, with `app`; with `processes` each in a worker of its own."""
    rows = dict.fromkeys(names, Path(__file__))
    with agents_with_rows(address, rows, home, policy=policy, processes=processes, app=app) as agents:
        yield agents


@contextmanager
def agents_with_rows(
    address: str,
    rows: Mapping[str, Path],
    home: Path,
    *,
    policy: Policy | None = None,
    processes: bool = False,
    app: str = CLIENT_APP,
) -> Iterator[dict[str, Agent]]:
    """As `fleet`, each agent with rows of its own, by default with the client's own functions."""
    loop = get_grpc_event_loop()

    def one(name: str) -> Agent:
        settings = ClientSettings(server=address, data=rows[name], insecure=True, policy=policy or Policy())
        return Agent(settings, name, home / name, None, app, None if processes else InlineWorkshop())

    async def start() -> dict[str, Agent]:
        return {name: one(name) for name in rows}

    agents = played(start())
    runs = [asyncio.run_coroutine_threadsafe(agent.run(), loop) for agent in agents.values()]
    try:
        yield agents
    finally:
        for agent in agents.values():
            loop.call_soon_threadsafe(agent.stop)
        for run in runs:
            run.exception(30)


def federation(channel: grpc.aio.Channel) -> Any:
    """The raw service, for those who misbehave."""
    return rpc.FederationStub(channel)  # type: ignore[no-untyped-call]  # generated


def wait_for(condition: Callable[[], Any], seconds: float = 15.0) -> None:
    """Poll until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


def messages(
    grid: GrpcGrid, names: Sequence[str], state: bytes = b"", round_: int = 1, run: str = RUN.digest
) -> list[Message]:
    """A training task for each, one content for all."""
    grid.know(names)
    content = task_content(Task(run, round_, state))
    return [Message(content, node_id(name), TRAIN, group_id=str(round_)) for name in names]


def answer(reply: Message) -> dict[str, Any]:
    """What `tests.server.apps` answered."""
    assert not reply.has_error(), reply.error.reason
    return dict(reply.content.config_records["update"])


def collected(grid: GrpcGrid, ids: Sequence[str], seconds: float = 15.0) -> list[Message]:
    """All replies."""
    replies: list[Message] = []
    deadline = time.monotonic() + seconds
    while len(replies) < len(ids):
        assert time.monotonic() < deadline, f"{len(replies)} of {len(ids)} replies came"
        replies.extend(grid.pull_messages(ids))
    return replies


def reason(reply: Message) -> str:
    """Why a task came to nothing."""
    assert reply.has_error()
    return reply.error.reason or ""
