"""Members that went away, fail or come twice: rounds go on without them, and people are told of whom."""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fedpeft.config.run_file import build_run
from fedpeft.runtime.repeats import EVERY_S, Repeats
from fedpeft_client.commands.run_commands import info_table
from fedpeft_server.runs.admin_messages import incomplete_members, run_info
from fedpeft_server.runs.control import Patience
from fedpeft_server.runs.members import MemberRounds, incomplete, waits_for
from fedpeft_server.runs.run_statuses import RunStatuses
from fedpeft_server.store import Rules, RunStatus, Store, StoredRun
from tests.server.in_memory_grid import InMemoryGrid
from tests.server.test_supervisor import LONG_S, Daemon, tables

NOON = 1_700_000_000.0  # 2023-11-14 22:13:20 UTC
NORTH = 1  # the node of client-0


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with Store(tmp_path / "state") as store:
        made = Daemon(store, patience=Patience(600.0, away_s=60.0))
        yield made
        assert made.supervisor.drain(LONG_S)


def gone(daemon: Daemon, seconds: float, *nodes: int) -> None:
    """From the roll call on, these do not answer, and have been away for so long."""

    def prepare(grid: InMemoryGrid) -> None:
        grid.leaving |= set(nodes)
        grid.gone_s |= dict.fromkeys(nodes, seconds)

    daemon.prepared = prepare


def waiting(daemon: Daemon, run_id: str) -> StoredRun:
    deadline = time.monotonic() + LONG_S
    while time.monotonic() < deadline:
        stored = daemon.supervisor.get(run_id)
        if stored.reason.startswith("waits for"):
            return stored
        time.sleep(0.02)
    raise AssertionError(f"{stored.status} ({stored.reason})")


def rows(store: Store, run_id: str) -> list[dict[str, Any]]:
    return [json.loads(line.text) for line in store.runs.lines(run_id)]


def test_a_round_does_without_a_member_that_is_away_for_longer_than_its_grace(daemon: Daemon) -> None:
    gone(daemon, 61.0, NORTH)
    stored = daemon.ended(daemon.submit(tables()).id)
    assert stored.status == RunStatus.FINISHED, stored.reason
    outcomes = [row["outcomes"] for row in rows(daemon.store, stored.id) if row["event"] == "round"][1:]
    for of_round in outcomes:
        told = {item["client"]: (item["status"], item["reason"]) for item in of_round}
        assert told["client-0"] == ("late", "away, and all who were connected had answered")
        assert [status for status, _ in told.values()].count("folded") == 3
    assert "client-0: 0 of 2 rounds counted" in [row.get("text") for row in rows(daemon.store, stored.id)]
    info = run_info(daemon.store, stored)
    info.incomplete.extend(incomplete_members(daemon.store, stored))
    assert info_table(info)["incomplete"] == [{"name": "client-0", "counted": 0, "asked": 2}]


def test_until_then_the_round_waits_and_says_for_whom(daemon: Daemon) -> None:
    gone(daemon, 5.0, NORTH)
    stored = waiting(daemon, daemon.submit(tables()).id)
    assert stored.status == RunStatus.RUNNING
    assert stored.reason.startswith(f"waits for {NORTH}, away since ")
    assert stored.reason in [row.get("reason") for row in rows(daemon.store, stored.id)]
    daemon.grids[0].gone_s[NORTH] = 61.0
    ended = daemon.ended(stored.id)
    assert (ended.status, ended.reason) == (RunStatus.FINISHED, "")


def test_a_round_waits_for_its_quorum_however_long_members_are_away(daemon: Daemon) -> None:
    gone(daemon, 1e6, 1, 2, 3)
    stored = waiting(daemon, daemon.submit(tables()).id)
    time.sleep(0.5)
    assert daemon.supervisor.get(stored.id).status == RunStatus.RUNNING
    daemon.supervisor.stop(stored.id, "enough")


def test_a_deadline_of_the_run_file_is_the_runs_own_word(daemon: Daemon) -> None:
    gone(daemon, 1e6, NORTH)
    began = time.monotonic()
    stored = daemon.ended(daemon.submit(tables(deadline_s=2.0)).id)
    assert stored.status == RunStatus.FINISHED
    assert time.monotonic() - began > 2 * 2.0


def test_of_a_secret_cohort_only_the_daemons_own_log_speaks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert waits_for({}, NOON) == ""
    private = tables(sampling={"kind": "poisson", "rate": 1.0}, weighting="uniform")
    del private["data"]["limit"]
    private["privacy"] = {
        "kind": "client-level",
        "clip_norm": 1.0,
        "noise_multiplier": 2.0,
        "target_delta": 1e-3,
        "max_epsilon": 100.0,
    }
    with Store(tmp_path / "state") as store:
        daemon = Daemon(store, patience=Patience(600.0, away_s=60.0))
        gone(daemon, 5.0, 1, 2, 3, 4)
        stored = daemon.submit(private)
        deadline = time.monotonic() + 60.0
        while not [record for record in caplog.records if "waits for" in record.getMessage()]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert daemon.supervisor.get(stored.id).reason == ""
        assert "waits" not in json.dumps(rows(store, stored.id))
        daemon.supervisor.stop(stored.id, "enough")


def test_for_whom_a_round_waits_in_words() -> None:
    away = {"south": 60.0, "north": 3600.0}
    assert waits_for(away, NOON) == "waits for north, away since 21:13 UTC; south, away since 22:12 UTC"
    assert waits_for({"north": 86_400.0}, NOON) == "waits for north, away since 2023-11-13 22:13 UTC"
    many = waits_for({f"site-{number}": 1.0 for number in range(9)}, NOON)
    assert many.endswith("; and 4 more")


def test_members_are_counted_by_what_came_of_their_rounds() -> None:
    found = incomplete(
        json.dumps({"outcomes": [{"client": name, "status": status} for name, status in outcomes]})
        for outcomes in (
            (("north", "failed"), ("south", "folded")),
            (("north", "late"), ("south", "folded"), ("east", "folded")),
            (("north", "refused"), ("east", "dropped")),
        )
    )
    assert found == [MemberRounds("east", 1, 2), MemberRounds("north", 0, 3)]
    assert str(found[1]) == "north: 0 of 3 rounds counted"
    assert incomplete(['{"outcomes": []}', "{}"]) == []


def test_a_warning_is_due_once_a_minute_and_again_when_it_was_over() -> None:
    now = [0.0]
    repeats = Repeats(lambda: now[0])
    said = []
    for second in range(130):
        now[0] = float(second)
        said += [second] * repeats.due("storage")
    assert said == [0, int(EVERY_S), int(2 * EVERY_S)]
    assert repeats.over("storage")
    assert repeats.due("storage")
    assert not repeats.over("other")


def test_a_database_that_is_away_is_one_warning_however_often_it_is_tried(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with Store(tmp_path / "state", busy_s=0.01) as store:
        stored = store.runs.submit(
            build_run(tables(), source="test"), Rules(), submission="1", submitter="me"
        )
        statuses = RunStatuses(store, lambda: True)
        with closing(sqlite3.connect(tmp_path / "state" / "state.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for _ in range(20):
                statuses.trouble([stored.id], "the database is locked")
                statuses.patiently(lambda: store.runs.set_status(stored.id, RunStatus.RUNNING))
            assert statuses.as_it_stands(store.runs.get(stored.id)).reason == "the database is locked"
            other.execute("ROLLBACK")
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert warnings == ["updates cannot be stored, and runs wait: the database is locked"]
        statuses.trouble([stored.id], None)
        assert [r.getMessage() for r in caplog.records][-1] == "updates can be stored again"
        assert statuses.as_it_stands(store.runs.get(stored.id)).status == RunStatus.RUNNING
