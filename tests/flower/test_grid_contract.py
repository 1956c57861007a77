"""What our in-process grid promises as a Flower `Grid`, and what we rely on beyond Flower's public API."""

from __future__ import annotations

import subprocess
import sys

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedpeft.flower.local_grid import LocalGrid
from fedpeft.transport.node_identity import ensure_identity
from fedpeft.transport.roster import roll_call
from fedpeft.transport.tasks import HELLO, Task, read_hello, task_content
from fedpeft.workers import InlineWorkers


def grid(clients: int = 3) -> LocalGrid:
    return LocalGrid(clients, InlineWorkers(), "tests.flower.apps:all_honest")


def messages(nodes: list[int]) -> list[Message]:
    content = task_content(Task("run", 0, b""))
    return [Message(content, node, HELLO, group_id="0") for node in nodes]


def test_it_is_a_grid_with_numbered_nodes() -> None:
    made = grid()
    assert isinstance(made, Grid)
    assert list(made.get_node_ids()) == [1, 2, 3]


def test_send_and_receive_answers_every_message_once() -> None:
    made = grid()
    replies = list(made.send_and_receive(messages([1, 2, 3])))
    assert sorted(reply.metadata.src_node_id for reply in replies) == [1, 2, 3]
    assert sorted(read_hello(reply).client for reply in replies) == ["client-0", "client-1", "client-2"]
    assert all(reply.metadata.group_id == "0" for reply in replies)
    assert list(made.pull_messages(["1", "2", "3"])) == []


def test_push_and_pull_by_id() -> None:
    made = grid()
    ids = list(made.push_messages(messages([2, 3])))
    assert len(set(ids)) == 2
    came: list[Message] = []
    while len(came) < 2:
        came.extend(made.pull_messages(ids))
    assert sorted(reply.metadata.src_node_id for reply in came) == [2, 3]


def test_cancelled_messages_are_never_run() -> None:
    made = grid()
    ids = list(made.push_messages(messages([1, 2, 3])))
    made.cancel(ids[1:])
    came: list[Message] = []
    for _ in range(3):
        came.extend(made.pull_messages(ids))
    assert [reply.metadata.src_node_id for reply in came] == [1]


def test_an_unknown_action_is_an_error_reply() -> None:
    made = grid()
    message = Message(RecordDict({"x": ConfigRecord({"y": 1})}), 1, "query.nothing", group_id="0")
    (reply,) = made.send_and_receive([message])
    assert reply.has_error()
    assert "nothing" in (reply.error.reason or "")


def test_roll_call_needs_enough_nodes() -> None:
    with pytest.raises(Exception, match="3 nodes are connected after 0 s and 4 are needed"):
        roll_call(grid(), Task("run", 0, b""), expected=4, timeout_s=0.0)


def test_messages_can_be_made_only_after_the_identity_is_set() -> None:
    """The contract of `fedpeft.transport.node_identity`: Flower still needs what it sets, and takes it."""
    script = (
        "from flwr.app import Message, RecordDict\n"
        "def make(): return Message(RecordDict(), 5, 'train')\n"
        "try:\n    make()\nexcept RuntimeError: pass\n"
        "else: raise SystemExit('Flower no longer needs an identity')\n"
        "from fedpeft.transport.node_identity import SERVER_NODE_ID, ensure_identity\n"
        "ensure_identity(); message = make()\n"
        "assert message.metadata.src_node_id == SERVER_NODE_ID and message.metadata.run_id == 1\n"
        "from flwr.supercore.task_identity import TaskIdentity\n"
        "TaskIdentity.node_id = 77; ensure_identity()\n"
        "assert make().metadata.src_node_id == 77, 'an identity that a runtime has set stays'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    ensure_identity()
