"""A federation whose rounds are buffered, server and agent killed while agents are at work all the time.

Who is counted when depends on the machine here, so there are no bytes to compare with. What must hold is the
accounting: each round's updates are of tasks that were asked once and counted once, and nothing that was
acknowledged is missing.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.test_kill_federation import held, tables
from tests.server.test_kill_anywhere import asked

SERVER = [
    "server.results.verified",
    "server.accept.inserted:3",
    "server.results.durable:4",
    "server.round.written",
    "server.round.opened:2",
    "server.checkpoint.written:2",
    "server.commit.counted",
    "server.commit.committed:3",
]
AGENT = ["agent.worker.done", "agent.result.durable", "agent.result.sending", "agent.result.acknowledged:2"]
SIZE = 2


@pytest.mark.slow
@pytest.mark.exhaustive
def test_buffered_rounds_count_each_update_once_whoever_is_killed(tmp_path: Path) -> None:
    run = tables(tmp_path)
    run["run"]["rounds"] = rounds = 4 * len(SERVER)
    run["stages"] = [{"kind": "ternary", "density": 0.2}]
    run["federation"] = {
        "mode": "buffered",
        "buffer": {"size": SIZE, "concurrency": 3, "max_staleness": rounds},
        "quorum": 1.0,
    }
    server, agents = held(tmp_path, run, SERVER, AGENT)
    assert server.killed == SERVER
    assert agents[0].killed == AGENT
    rows = [
        json.loads(text) for (text,) in asked(tmp_path / "state", "SELECT text FROM lines ORDER BY number")
    ]
    found = [row for row in rows if row["event"] == "round" and row["round"]]
    assert [row["round"] for row in found] == list(range(1, rounds + 1))
    outcomes = [(row["round"], item) for row in found for item in row["outcomes"]]
    assert {item["status"] for _, item in outcomes} == {"folded"}, "nobody failed, and nothing was given up"
    assert all(len(row["outcomes"]) == SIZE for row in found)
    tasks = [(item["client"], number - item["staleness"]) for number, item in outcomes]
    assert len(set(tasks)) == len(tasks), "each task counts once"
    updates = asked(tmp_path / "state", "SELECT agent, round, counted FROM updates")
    assert {(agent, number) for agent, number, counted in updates if counted} == set(tasks)
    waiting = [(agent, number) for agent, number, counted in updates if not counted]
    assert len(waiting) <= len(agents), "at the end each agent had one task at most"
    assert any(item["staleness"] for _, item in outcomes), "some were at work while a round ended"
