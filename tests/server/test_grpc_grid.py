"""What the grid over gRPC promises: all that LocalGrid does, and what only a network asks for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid

from fedpeft.errors import FederationError, UpdateError
from fedpeft.transport.roster import roll_call
from fedpeft.transport.tasks import HELLO, Task, task_content
from fedpeft_server.store.memory_store import MemoryAcceptor, MemoryBlobs
from fedpeft_server.transport.grpc_grid import GrpcGrid, RunIdentity, node_id
from fedpeft_server.transport.serving import RunningServer
from tests.server.fleet import RUN, answer, collected, fleet, messages, reason, server, wait_for

NAMES = ["site-a", "site-b", "site-c"]


@pytest.fixture(scope="module")
def running() -> Iterator[RunningServer]:
    with server(max_inline_bytes=4096) as started:
        yield started


@pytest.fixture(scope="module")
def grid(running: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GrpcGrid]:
    """One for all tests of this file; each uses a round of its own."""
    with fleet(running.address, NAMES, tmp_path_factory.mktemp("agents")):
        made = running.grid(RUN)
        wait_for(lambda: made.agents_here == NAMES)
        yield made


def test_it_is_a_grid_whose_nodes_are_the_connected_agents(grid: GrpcGrid) -> None:
    assert isinstance(grid, Grid)
    assert sorted(grid.get_node_ids()) == sorted(node_id(name) for name in NAMES)
    assert len({node_id(f"site-{number}") for number in range(10_000)}) == 10_000


def test_send_and_receive_answers_every_message_once(grid: GrpcGrid) -> None:
    replies = list(grid.send_and_receive(messages(grid, NAMES, b"hi", 1)))
    assert {answer(reply)["client"] for reply in replies} == set(NAMES)
    assert sorted(reply.metadata.src_node_id for reply in replies) == sorted(map(node_id, NAMES))
    assert all(reply.metadata.group_id == "1" and answer(reply)["payload"] == b"hi" for reply in replies)


def test_push_and_pull_by_id(grid: GrpcGrid) -> None:
    ids = list(grid.push_messages(messages(grid, NAMES[1:], b"", 2)))
    assert len(set(ids)) == 2
    assert {answer(reply)["client"] for reply in collected(grid, ids)} == set(NAMES[1:])
    assert list(grid.pull_messages(ids)) == []


def test_large_bodies_travel_as_blobs_both_ways(grid: GrpcGrid) -> None:
    down = b"s" * 1_000_000
    (reply,) = grid.send_and_receive(messages(grid, NAMES[:1], down, 3))
    assert answer(reply)["payload"] == down
    (reply,) = grid.send_and_receive(messages(grid, NAMES[:1], b"large:700001", 4))
    assert answer(reply)["payload"] == b"x" * 700_001


def test_cancelled_messages_are_never_answered(grid: GrpcGrid) -> None:
    ids = list(grid.push_messages(messages(grid, NAMES, b"sleep:0.3", 5)))
    grid.cancel(ids[1:])
    replies = collected(grid, ids[:1])
    time.sleep(0.5)
    replies += list(grid.pull_messages(ids))
    assert [answer(reply)["client"] for reply in replies] == [NAMES[0]]


def test_a_new_round_withdraws_what_older_ones_left(grid: GrpcGrid) -> None:
    late = list(grid.push_messages(messages(grid, NAMES, b"sleep:0.5", 6)))
    on_time = list(grid.push_messages(messages(grid, NAMES, b"", 7)))
    collected(grid, on_time)
    assert list(grid.pull_messages(late)) == []


def test_what_the_client_fails_with_is_an_error_reply(grid: GrpcGrid) -> None:
    (reply,) = grid.send_and_receive(messages(grid, NAMES[:1], b"fail", 8))
    assert "an error that is not one of fedpeft's ('internal')" in reason(reply)
    assert "bug" not in reason(reply)
    content = task_content(Task(RUN.digest, 8, b""))
    unknown = Message(content, node_id(NAMES[0]), "query.nothing", group_id="8")
    (reply,) = grid.send_and_receive([unknown])
    assert reply.has_error()


def test_roll_call(grid: GrpcGrid) -> None:
    roster = roll_call(grid, Task(RUN.digest, 0, b""), expected=3, timeout_s=10.0)
    assert roster.names == NAMES
    assert {name: member.node_id for name, member in roster.members.items()} == {n: node_id(n) for n in NAMES}


def test_an_agent_answers_the_roll_call_under_its_own_name_only(
    running: RunningServer, grid: GrpcGrid, tmp_path: Path
) -> None:
    grid.know(["mallory"])
    with fleet(running.address, ["mallory"], tmp_path, app="tests.server.apps:impostor"):
        content = task_content(Task(RUN.digest, 0, b""))
        (reply,) = grid.send_and_receive([Message(content, node_id("mallory"), HELLO, group_id="0")])
    assert "under another name than its own" in reason(reply)


def test_a_message_to_nobody_is_refused(grid: GrpcGrid) -> None:
    message = Message(task_content(Task(RUN.digest, 1, b"")), 5, HELLO, group_id="1")
    with pytest.raises(FederationError, match="node 5 is no agent of this run"):
        grid.push_messages([message])


def test_arrays_are_no_content(grid: GrpcGrid) -> None:
    (message,) = messages(grid, NAMES[:1])
    message.content["numbers"] = ConfigRecord({"list": [1, 2]})
    with pytest.raises(UpdateError, match="only single values can be sent"):
        grid.push_messages([message])


def test_runs_share_agents_and_nothing_else(running: RunningServer, grid: GrpcGrid) -> None:
    other = running.grid(RunIdentity("run-2", "cd" * 32), agents=NAMES[:2])
    assert other.agents_here == NAMES[:2]
    ours = list(grid.push_messages(messages(grid, NAMES, b"ours", 9)))
    theirs = list(other.push_messages(messages(other, NAMES[:2], b"theirs", 9, run="cd" * 32)))
    assert {answer(reply)["payload"] for reply in collected(grid, ours)} == {b"ours"}
    assert {answer(reply)["payload"] for reply in collected(other, theirs)} == {b"theirs"}


def test_a_cut_connection_costs_nothing_but_time(running: RunningServer, grid: GrpcGrid) -> None:
    ids = list(grid.push_messages(messages(grid, NAMES, b"sleep:0.4", 10)))
    time.sleep(0.1)
    sessions = {agent.name: agent.sessions for agent in running.agents()}
    for name in NAMES[:2]:
        running.disconnect(name, "cut by the test")
    replies = collected(grid, ids)
    assert sorted(answer(reply)["client"] for reply in replies) == NAMES
    now = {agent.name: agent.sessions for agent in running.agents()}
    assert [now[name] - sessions[name] for name in NAMES] == [1, 1, 0]


def test_work_waits_for_an_agent_that_is_away(running: RunningServer, grid: GrpcGrid, tmp_path: Path) -> None:
    ids = list(grid.push_messages(messages(grid, ["site-late"], b"", 11)))
    assert list(grid.pull_messages(ids)) == []
    with fleet(running.address, ["site-late"], tmp_path):
        assert answer(collected(grid, ids)[0])["client"] == "site-late"


def test_stopping_a_run_wakes_whoever_waits(running: RunningServer, grid: GrpcGrid) -> None:
    other = running.grid(RunIdentity("run-3", RUN.digest))
    ids = list(other.push_messages(messages(other, NAMES, b"sleep:0.5", 1)))
    threading.Timer(0.05, other.stop, [FederationError("stopped by its submitter")]).start()
    with pytest.raises(FederationError, match="stopped by its submitter"):
        collected(other, ids)
    with pytest.raises(FederationError, match="stopped by its submitter"):
        other.push_messages(messages(other, NAMES, b"", 2))


def test_what_was_accepted_before_a_restart_is_not_asked_again(tmp_path: Path) -> None:
    acceptor, blobs = MemoryAcceptor(), MemoryBlobs()
    with server(acceptor, blobs, max_inline_bytes=512) as first, fleet(first.address, NAMES[:2], tmp_path):
        grid = first.grid(RUN)
        small = list(grid.send_and_receive(messages(grid, NAMES[:1], b"small", 1)))
        large = list(grid.send_and_receive(messages(grid, NAMES[1:2], b"large:5000", 2)))
    with server(acceptor, blobs) as second:  # nobody is connected
        grid = second.grid(RUN)
        again = list(grid.send_and_receive(messages(grid, NAMES[:1], b"small", 1), timeout=5.0))
        assert [answer(reply) for reply in again] == [answer(reply) for reply in small]
        again = list(grid.send_and_receive(messages(grid, NAMES[1:2], b"large:5000", 2), timeout=5.0))
        assert [answer(reply) for reply in again] == [answer(reply) for reply in large]
        other = list(grid.send_and_receive(messages(grid, NAMES[:1], b"another task", 1), timeout=0.3))
        assert other == []


def test_it_says_how_long_an_agent_has_been_away(tmp_path: Path) -> None:
    with server() as running:
        grid = running.grid(RUN)
        grid.know(["site"])
        time.sleep(0.1)
        never = grid.away_s(node_id("site"))
        assert never is not None
        assert never[0] == "site"
        assert never[1] >= 0.1, "since the server started"
        with fleet(running.address, ["site"], tmp_path):
            wait_for(lambda: grid.agents_here == ["site"])
            assert grid.away_s(node_id("site")) is None
            here = time.monotonic()
        wait_for(lambda: grid.agents_here == [])
        left = grid.away_s(node_id("site"))
        assert left is not None
        assert left[1] <= time.monotonic() - here, "since it left"
