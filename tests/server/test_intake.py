"""Results are durable before anybody hears of them, however long that takes."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from fedpeft.errors import StorageError
from fedpeft_server.store.contracts import ReceivedResult
from fedpeft_server.store.memory_store import MemoryAcceptor
from tests.server.fleet import RUN, answer, collected, fleet, messages, reason, server, wait_for

NAMES = [f"site-{number}" for number in range(8)]


class Reluctant:
    """Refuses to store until it is told that there is space again, and remembers what was asked."""

    def __init__(self) -> None:
        self.space = threading.Event()
        self.inner = MemoryAcceptor()
        self.batches: list[int] = []
        self.threads: set[str] = set()

    def accept(self, arrivals: Sequence[ReceivedResult]) -> Sequence[str | None]:
        self.threads.add(threading.current_thread().name)
        if not self.space.is_set():
            raise StorageError("the disk is full; free some space")
        self.batches.append(len(arrivals))
        return self.inner.accept(arrivals)

    def recall(self, run: str, round_: int, kind: str) -> Sequence[ReceivedResult]:
        return self.inner.recall(run, round_, kind)

    def free_place(self, run: str, round_: int, agent: str) -> None:
        self.inner.free_place(run, round_, agent)


def outbox(home: Path) -> int:
    return len(list(home.glob("*/outbox/*.result")))


def test_a_full_disk_pauses_the_round_and_loses_nothing(tmp_path: Path) -> None:
    acceptor, lines = Reluctant(), list[str | None]()
    with server(acceptor, trouble=lines.append) as running, fleet(running.address, NAMES, tmp_path):
        grid = running.grid(RUN)
        wait_for(lambda: grid.agents_here == NAMES)
        ids = list(grid.push_messages(messages(grid, NAMES, b"hi")))
        wait_for(lambda: lines and outbox(tmp_path) == len(NAMES))
        time.sleep(0.2)
        assert list(grid.pull_messages(ids)) == []
        assert outbox(tmp_path) == len(NAMES), "agents keep what was not acknowledged"
        acceptor.space.set()
        replies = collected(grid, ids)
        assert {answer(reply)["client"] for reply in replies} == set(NAMES)
        wait_for(lambda: outbox(tmp_path) == 0)
    assert lines[0] == "the disk is full; free some space"
    assert lines[-1] is None
    assert sum(acceptor.batches) == len(NAMES)
    assert len(acceptor.batches) < len(NAMES), "results that wait are stored together"
    assert all("transport" not in name for name in acceptor.threads), "never on the event loop"


class Choosy(MemoryAcceptor):
    """Doesn't take what one agent sends."""

    def accept(self, arrivals: Sequence[ReceivedResult]) -> Sequence[str | None]:
        return [
            "not from you" if arrival.agent == "site-1" else verdict
            for arrival, verdict in zip(arrivals, super().accept(arrivals), strict=True)
        ]


def test_what_the_store_refuses_fails_at_its_sender_alone(tmp_path: Path) -> None:
    with server(Choosy()) as running, fleet(running.address, NAMES[:3], tmp_path):
        grid = running.grid(RUN)
        replies = list(grid.send_and_receive(messages(grid, NAMES[:3], b"hi")))
        wait_for(lambda: outbox(tmp_path) == 0)
        again = list(grid.send_and_receive(messages(grid, NAMES[:3], b"again", 2)))
        wait_for(lambda: outbox(tmp_path) == 0)
    reasons = [reason(reply) for reply in replies if reply.has_error()]
    assert reasons == ["UpdateError: not from you"]
    counts = {answer(reply)["client"]: answer(reply)["asked"] for reply in again if not reply.has_error()}
    assert counts == {"site-0": 2, "site-2": 2}
    # A result that never counted leaves no trace in what the client's stages remember.
    memory = tmp_path / "site-1" / "memory"
    assert not list(memory.glob("*.memory"))


@pytest.mark.parametrize("lost", [False, True], ids=["in the outbox", "done again"])
def test_an_agent_that_restarts_before_its_result_is_acknowledged(tmp_path: Path, lost: bool) -> None:
    """Its result counts once, and its stages remember each round once."""
    acceptor = Reluctant()
    with server(acceptor) as running:
        grid = running.grid(RUN)
        acceptor.space.set()
        with fleet(running.address, ["site-0"], tmp_path):
            (first,) = grid.send_and_receive(messages(grid, ["site-0"], b"hi", 1))
            acceptor.space.clear()
            ids = list(grid.push_messages(messages(grid, ["site-0"], b"hi", 2)))
            wait_for(lambda: outbox(tmp_path) == 1)
        if lost:
            for file in tmp_path.glob("*/outbox/*.result"):
                file.unlink()
        acceptor.space.set()
        with fleet(running.address, ["site-0"], tmp_path):
            (second,) = collected(grid, ids)
            (third,) = grid.send_and_receive(messages(grid, ["site-0"], b"hi", 3))
    assert [answer(reply)["asked"] for reply in (first, second, third)] == [1, 2, 3]
