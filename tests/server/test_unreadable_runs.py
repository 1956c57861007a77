"""Runs that another version stored and this one cannot read: set aside, listed as such, in nobody's way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedpeft.config.run_file import build_run
from fedpeft.errors import StateError
from fedpeft_server.runs.admin_messages import incomplete_members, run_info
from fedpeft_server.runs.supervisor import Supervisor
from fedpeft_server.store import Quota, Rules, RunStatus, Store
from tests.server.in_memory_grid import InMemoryGrid, standins
from tests.server.test_models_apart import LONG_S, tables

QUOTA = Quota(runs=3, rounds=50)


def changed(store: Store, run_id: str, **columns: Any) -> None:
    """A row as another version wrote it."""
    with store.database.writing() as connection:
        for name, value in columns.items():
            connection.exec_driver_sql(f"UPDATE runs SET {name} = ? WHERE id = ?", (value, run_id))


def unread(store: Store, name: str) -> str:
    """A run that has a key which this version does not know."""
    run = build_run(tables(run={"name": name, "rounds": 1}), source="test")
    stored = store.runs.submit(run, Rules(), submission=name, submitter="me")
    later = json.loads(stored.text)
    later["run"]["of_a_later_version"] = True
    changed(store, stored.id, run_json=json.dumps(later))
    return stored.id


def test_a_run_that_cannot_be_read_is_set_aside_and_the_others_go_on(tmp_path: Path) -> None:
    grids: list[InMemoryGrid] = []
    with Store(tmp_path) as store:
        aside = unread(store, "later")
        supervisor = Supervisor(store, standins(store, grids), quota=QUOTA)
        supervisor.start()
        shown = supervisor.get(aside)
        assert shown.status == RunStatus.PAUSED
        assert shown.reason.startswith(f"set aside: this version cannot read run {aside} (")
        assert "of_a_later_version" in shown.reason
        with pytest.raises(StateError, match="this version cannot read run"):
            _ = shown.run
        sound = supervisor.submit(
            build_run(tables(run={"name": "sound", "rounds": 1}), source="test"),
            Rules(),
            submission="sound",
            submitter="me",  # whose quota is asked with the other run in it
        )
        assert supervisor.wait_idle(LONG_S)
        assert [stored.id for stored in supervisor.list()] == [sound.id, aside]
        told = [run_info(store, stored) for stored in supervisor.list(reader="me")]
        assert [(info.name, info.status) for info in told] == [("sound", "finished"), ("later", "paused")]
        assert incomplete_members(store, shown) == []
        assert supervisor.stop(aside, "enough").status == RunStatus.STOPPED
        assert supervisor.drain(LONG_S)


def test_a_run_of_an_earlier_version_goes_on_when_that_one_is_back(tmp_path: Path) -> None:
    """Setting it aside changed nothing but its standing."""
    grids: list[InMemoryGrid] = []
    with Store(tmp_path) as store:
        run = build_run(tables(run={"name": "later", "rounds": 1}), source="test")
        stored = store.runs.submit(run, Rules(), submission="later", submitter="me")
        changed(store, stored.id, run_json="{}{")
        Supervisor(store, standins(store, grids)).start()
        assert store.runs.get(stored.id).status == RunStatus.PAUSED
        changed(store, stored.id, run_json=stored.text)
        supervisor = Supervisor(store, standins(store, grids))
        supervisor.start()
        assert supervisor.wait_idle(LONG_S)
        assert store.runs.get(stored.id).status == RunStatus.FINISHED


@pytest.mark.parametrize(
    ("columns", "status", "problem"),
    [
        ({"status": "dreaming"}, RunStatus.FAILED, "does not know the status 'dreaming'"),
        ({"rules": '{"moon": "full"}'}, RunStatus.QUEUED, "cannot read the rules"),
        ({"roster": '{"moon": "full"}'}, RunStatus.QUEUED, ""),
    ],
)
def test_what_else_of_a_row_cannot_be_read_hides_no_other_run(
    tmp_path: Path, columns: dict[str, Any], status: RunStatus, problem: str
) -> None:
    with Store(tmp_path) as store:
        run = build_run(tables(), source="test")
        ours, theirs = (
            store.runs.submit(run, Rules(), submission=name, submitter=name).id for name in ("me", "you")
        )
        changed(store, ours, **columns)
        listed = {stored.id: stored for stored in store.runs.list()}
        assert listed.keys() == {ours, theirs}
        assert listed[ours].status == status
        assert problem in listed[ours].problem
        assert bool(listed[ours].problem) == bool(problem)
        assert run_info(store, listed[ours]).id == ours
        store.runs.set_status(ours, RunStatus.STOPPED, "enough")
        assert store.runs.get(ours).status == RunStatus.STOPPED
