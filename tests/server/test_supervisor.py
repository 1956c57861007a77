"""Runs on the daemon: queued, held, stopped, paused by what is outside, and gone on with after a restart."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedpeft.config.run_file import build_run
from fedpeft.errors import RunFileError, UsageError
from fedpeft_server.runs.control import PATIENCE, Control, Patience, SteadyClock
from fedpeft_server.runs.supervisor import Supervisor
from fedpeft_server.store import Rules, RunStatus, Store, StoredRun
from tests.server.in_memory_grid import InMemoryGrid, standins
from tests.simulation.runs import simulated

LONG_S = 60.0


def tables(**federation: Any) -> dict[str, Any]:
    """Four clients, two rounds of a step each."""
    return {
        "run": {"name": "tiny", "rounds": 2},
        "peft": {"method": "lora", "r": 2},
        "data": {"limit": 32, "max_length": 64, "partitioner": {"kind": "iid", "clients": 4}},
        "training": {"steps": 1, "batch_size": 4},
        "evaluation": {"bootstrap": 2, "metrics": ["token-accuracy"], "max_examples": 2, "every": 2},
        "federation": federation,
    }


class Daemon:
    """A store, a supervisor and the stand-ins that it opened."""

    def __init__(
        self,
        store: Store,
        clock: SteadyClock | None = None,
        parallel: int = 1,
        patience: Patience = PATIENCE,
    ) -> None:
        self.store = store
        self.grids: list[InMemoryGrid] = []
        self.prepared: Callable[[InMemoryGrid], None] = lambda grid: None
        self.supervisor = Supervisor(store, self._open, parallel=parallel, patience=patience, clock=clock)

    @contextmanager
    def _open(self, stored: StoredRun) -> Iterator[InMemoryGrid]:
        with standins(self.store, self.grids)(stored) as grid:
            self.prepared(grid)
            yield grid

    def submit(self, run: dict[str, Any], name: str = "one", **rules: Any) -> StoredRun:
        made = build_run(run, source="test")
        return self.supervisor.submit(made, Rules(**rules), submission=name, submitter="me")

    def ended(self, run_id: str) -> StoredRun:
        assert self.supervisor.wait_idle(LONG_S), self.supervisor.get(run_id)
        return self.supervisor.get(run_id)

    def reaches(self, run_id: str, status: RunStatus) -> StoredRun:
        deadline = time.monotonic() + LONG_S
        while time.monotonic() < deadline:
            stored = self.supervisor.get(run_id)
            if stored.status == status:
                return stored
            time.sleep(0.01)
        raise AssertionError(f"{stored.status} ({stored.reason}), not {status}")

    def statuses(self, run_id: str) -> list[str]:
        rows = [json.loads(line.text) for line in self.store.runs.lines(run_id)]
        return [row["status"] for row in rows if row["event"] == "status"]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with Store(tmp_path / "state") as store:
        made = Daemon(store)
        yield made
        assert made.supervisor.drain(LONG_S)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the undisturbed run's adapter, from the simulator."""
    finished = simulated(tables(), tmp_path_factory.mktemp("simulated")).summary.finished
    assert finished is not None
    return finished.adapter_digest


def test_a_run_ends_where_the_simulation_ends(daemon: Daemon, adapter: str) -> None:
    daemon.supervisor.start()
    submitted = daemon.submit(tables())
    stored = daemon.ended(submitted.id)
    assert (stored.status, stored.round, stored.adapter_digest) == (RunStatus.FINISHED, 2, adapter)
    folder = daemon.store.run_folder(stored.id)
    for name in ("adapter", "report.html", "metrics.jsonl", "summary.json", "run.toml"):
        assert (folder / name).exists()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows] == ["started", "round", "round", "round", "finished"]
    assert daemon.statuses(stored.id) == ["running", "finished"]


def test_runs_wait_for_each_other_and_a_submission_counts_once(daemon: Daemon) -> None:
    first = daemon.submit(tables(), "one")
    same = daemon.submit(tables(), "one")
    twin = daemon.submit(tables(), "two")
    assert (same.id, twin.id) == (first.id, "tiny-2")
    assert daemon.ended(twin.id).status == RunStatus.FINISHED
    runs = daemon.supervisor.list()
    assert [(run.id, run.status) for run in runs] == [
        (twin.id, RunStatus.FINISHED),
        (first.id, RunStatus.FINISHED),
    ]
    assert runs[0].adapter_digest == runs[1].adapter_digest
    with pytest.raises(UsageError, match="came before with another run file"):
        daemon.submit(tables(quorum=0.9), "one")


def test_what_cannot_be_run_is_refused_when_it_is_submitted(daemon: Daemon) -> None:
    bad = tables()
    bad["peft"]["method"] = "nonsense"
    bad["stages"] = [{"kind": "nothing"}]
    with pytest.raises(RunFileError) as caught:
        daemon.submit(bad)
    assert len(caught.value.problems) >= 2
    unknown = tables()
    unknown["data"] |= {"train": "x.jsonl", "text": "{t}", "partitioner": {"kind": "natural", "by": "t"}}
    with pytest.raises(UsageError, match="--min-agents"):
        daemon.submit(unknown)
    with pytest.raises(UsageError, match="cohort is 4 and there are 2"):
        daemon.submit(tables(sampling={"kind": "fixed", "cohort": 4}), min_agents=2)
    with pytest.raises(UsageError, match="no run 'other-7'"):
        daemon.supervisor.get("other-7")
    assert daemon.supervisor.list() == []


def test_a_restart_in_the_middle_of_a_round_asks_nobody_twice(tmp_path: Path, adapter: str) -> None:
    """The first daemon is put aside after two of four updates; the second one asks the other two alone."""
    with Store(tmp_path / "state") as store:
        first = Daemon(store)

        def leave_after_two(grid: InMemoryGrid) -> None:
            grid.hold_after = 2

        first.prepared = leave_after_two
        stored = first.submit(tables())
        first.reaches(stored.id, RunStatus.RUNNING)
        assert first.grids[0].held.wait(LONG_S)
        assert first.supervisor.drain(LONG_S)
        asked = [number for round_, number in first.grids[0].worked if round_ == 1]
    assert len(asked) == 2
    with Store(tmp_path / "state") as store:
        second = Daemon(store)
        second.supervisor.start()
        assert second.ended(stored.id).adapter_digest == adapter
        again = [number for round_, number in second.grids[0].worked if round_ == 1]
        assert sorted(asked + again) == [1, 2, 3, 4]
        folded = [
            outcome["client"]
            for line in store.runs.lines(stored.id)
            if (row := json.loads(line.text))["event"] == "round" and row["round"] == 1
            for outcome in row["outcomes"]
        ]
        assert folded == ["client-0", "client-1", "client-2", "client-3"]


def test_a_stopped_run_leaves_the_adapter_of_its_last_round(daemon: Daemon) -> None:
    def hold(grid: InMemoryGrid) -> None:
        grid.hold_after = 5  # in round 2

    daemon.prepared = hold
    stored = daemon.submit(tables())
    daemon.reaches(stored.id, RunStatus.RUNNING)
    assert daemon.grids[0].held.wait(LONG_S)
    stopped = daemon.supervisor.stop(stored.id, "enough")
    assert (stopped.status, stopped.reason, stopped.round) == (RunStatus.STOPPED, "enough", 1)
    folder = daemon.store.run_folder(stored.id)
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert not (folder / "report.html").exists()
    assert daemon.supervisor.stop(stored.id, "again").reason == "enough"


def test_a_queued_run_is_stopped_at_once(daemon: Daemon) -> None:
    daemon.prepared = lambda grid: grid.away.update(range(1, 5))
    first, second = daemon.submit(tables(), "one"), daemon.submit(tables(quorum=0.9), "two")
    daemon.reaches(first.id, RunStatus.WAITING)
    assert daemon.supervisor.stop(second.id, "").status == RunStatus.STOPPED
    assert daemon.supervisor.stop(first.id, "").status == RunStatus.STOPPED


def test_a_run_waits_for_its_agents_and_says_so(daemon: Daemon, adapter: str) -> None:
    daemon.prepared = lambda grid: grid.away.update({2, 4})
    stored = daemon.submit(tables())
    waiting = daemon.reaches(stored.id, RunStatus.WAITING)
    assert waiting.reason == "2 of 4 agents are connected"
    daemon.grids[0].away.clear()
    assert daemon.ended(stored.id).adapter_digest == adapter


def test_a_run_says_which_of_the_agents_that_it_asks_are_away(daemon: Daemon) -> None:
    daemon.prepared = lambda grid: grid.away.update(range(1, 5))
    stored = daemon.submit(tables(), agents=("site-a", "nobody"), wait_s=0.2)
    assert "0 of 2 agents are connected; away: site-a, nobody; waited" in daemon.ended(stored.id).reason


def test_a_run_gives_up_when_its_agents_do_not_come(daemon: Daemon) -> None:
    daemon.prepared = lambda grid: grid.away.update(range(1, 5))
    stored = daemon.ended(daemon.submit(tables(), wait_s=0.2).id)
    assert stored.status == RunStatus.FAILED
    assert "0 of 4 agents are connected; waited for 0.2 s" in stored.reason


def test_a_round_without_a_quorum_is_tried_again(daemon: Daemon, adapter: str) -> None:
    def leave(grid: InMemoryGrid) -> None:
        grid.leaving = {1, 2, 3}  # after the roll call
        grid.at_once = True  # the deadline is for those that are away, however slow this machine is

    daemon.prepared = leave
    # The deadline is no part of the training: the adapter is that of the undisturbed run.
    stored = daemon.submit(tables(deadline_s=0.3))
    paused = daemon.reaches(stored.id, RunStatus.PAUSED)
    assert "round 1: 1 of 4 clients counted, the quorum is 2" in paused.reason
    daemon.grids[0].leaving = set()
    daemon.grids[0].away.clear()
    assert daemon.ended(stored.id).adapter_digest == adapter
    assert [number for round_, number in daemon.grids[0].worked if round_ == 1].count(4) == 1


def test_a_member_that_never_answers_does_not_stop_a_run_without_a_deadline(tmp_path: Path) -> None:
    with Store(tmp_path / "state") as store:
        daemon = Daemon(store, patience=Patience(0.3))

        def silent(grid: InMemoryGrid) -> None:
            grid.leaving = {2}  # after the roll call
            grid.at_once = True

        daemon.prepared = silent
        stored = daemon.ended(daemon.submit(tables()).id)
        assert (stored.status, stored.round) == (RunStatus.FINISHED, 2)
        rows = [json.loads(line.text) for line in store.runs.lines(stored.id)]
        outcomes = [row["outcomes"] for row in rows if row["event"] == "round" and row["round"]]
        assert [[o["status"] for o in each] for each in outcomes] == [
            ["folded", "late", "folded", "folded"]
        ] * 2


def test_a_locked_database_pauses_the_run(tmp_path: Path, adapter: str) -> None:
    with Store(tmp_path / "state", busy_s=0.1) as store:
        daemon = Daemon(store)
        locker = sqlite3.connect(store.folder / "state.db", isolation_level=None, check_same_thread=False)

        def lock(grid: InMemoryGrid) -> None:
            grid.before_accept = lambda: locker.execute("BEGIN IMMEDIATE")

        daemon.prepared = lock
        stored = daemon.submit(tables())
        paused = daemon.reaches(stored.id, RunStatus.PAUSED)
        assert "locked by another process" in paused.reason
        daemon.grids[0].before_accept = lambda: None
        locker.execute("ROLLBACK")
        locker.close()
        assert daemon.ended(stored.id).adapter_digest == adapter


def test_a_clock_that_jumps_pauses_the_run(tmp_path: Path, adapter: str) -> None:
    shift = [0.0]
    clock = SteadyClock(wall=lambda: time.time() + shift[0])
    with Store(tmp_path / "state") as store:
        daemon = Daemon(store, clock)

        def jump(grid: InMemoryGrid) -> None:
            grid.before_accept = lambda: shift.__setitem__(0, 3600.0)

        daemon.prepared = jump
        stored = daemon.submit(tables())
        paused = daemon.reaches(stored.id, RunStatus.PAUSED)
        assert "the clock jumped by +3600 s" in paused.reason
        assert daemon.ended(stored.id).adapter_digest == adapter
        assert daemon.statuses(stored.id) == ["running", "paused", "running", "finished"]


def test_a_broken_client_fails_the_run_with_its_reason(daemon: Daemon) -> None:
    broken = tables()
    broken["training"] |= {"lr": 1e30, "optimizer": "sgd", "steps": 3}
    stored = daemon.ended(daemon.submit(broken).id)
    assert stored.status == RunStatus.FAILED
    assert "TrainingError" in stored.reason
    assert "\n" not in stored.reason


def test_a_halt_is_heeded_from_any_thread() -> None:
    control = Control(SteadyClock())
    from fedpeft_server.runs.control import Draining, Stopped

    threading.Timer(0.05, lambda: control.halt(Draining("the end"))).start()
    with pytest.raises(Draining):
        control.sleep(LONG_S)
    control.halt(Stopped("a person's word"))
    with pytest.raises(Stopped):
        control.check()
