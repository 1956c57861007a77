"""A run that takes the daemon itself down is set aside; a kill from outside is not held against it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpeft.config.run_file import build_run
from fedpeft_server.runs.risks import CRASH, NOTES, Risks
from fedpeft_server.runs.supervisor import Supervisor
from fedpeft_server.store import Rules, RunStatus, Store, StoredRun
from tests.server.in_memory_grid import InMemoryGrid, standins
from tests.server.test_lost_processes import PATHS
from tests.server.test_models_apart import LONG_S, ROOT, tables

RUN = "tiny-1"


def lost(folder: Path, *, trace: str = "", reached: int = 0) -> None:
    """The daemon was at work for the run and did not come back."""
    note = folder / NOTES / f"{RUN}.json"
    with Risks(folder).at_work(RUN, reached):
        left = note.read_bytes()
    note.write_bytes(left)
    (folder / CRASH).write_text(trace)


def taken_stock(folder: Path) -> int:
    risks = Risks(folder)
    risks.take_stock([RUN])
    return risks.losses(RUN)


def test_a_crash_counts_and_a_kill_from_outside_does_not(tmp_path: Path) -> None:
    assert taken_stock(tmp_path) == 0
    lost(tmp_path)
    assert taken_stock(tmp_path) == 0
    lost(tmp_path, trace="Fatal Python error: Segmentation fault")
    assert taken_stock(tmp_path) == 1
    assert taken_stock(tmp_path) == 1, "an end is counted once"
    lost(tmp_path, trace="not at its end 50 s after the signal")
    assert taken_stock(tmp_path) == 2


def test_what_came_back_is_no_loss_and_a_round_begins_the_count_anew(tmp_path: Path) -> None:
    risks = Risks(tmp_path)
    with risks.at_work(RUN, 0):
        pass
    (tmp_path / CRASH).write_text("it crashed elsewhere")
    assert taken_stock(tmp_path) == 0
    lost(tmp_path, trace="crash")
    assert taken_stock(tmp_path) == 1
    with risks.at_work(RUN, 0):
        pass
    assert risks.losses(RUN) == 1
    with risks.at_work(RUN, 1):
        pass
    assert risks.losses(RUN) == 0


def test_the_systems_out_of_memory_killer_counts(tmp_path: Path) -> None:
    lost(tmp_path)
    note = tmp_path / NOTES / f"{RUN}.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"oom_kills": -1}))
    assert taken_stock(tmp_path) == 1


def test_notes_of_runs_that_ended_go(tmp_path: Path) -> None:
    lost(tmp_path, trace="crash")
    Risks(tmp_path).take_stock(["another-2"])
    assert list((tmp_path / NOTES).iterdir()) == []


def submitted(store: Store, name: str) -> StoredRun:
    run = build_run(tables(run={"name": name, "rounds": 1}), source="test")
    return store.runs.submit(run, Rules(), submission=name, submitter="me")


def test_a_run_over_which_the_server_was_lost_twice_is_set_aside_and_the_next_goes_on(tmp_path: Path) -> None:
    grids: list[InMemoryGrid] = []
    with Store(tmp_path) as store:
        hostile, sound = submitted(store, "tiny"), submitted(store, "sound")
        for _ in range(2):
            lost(tmp_path, trace="crash", reached=-1)
            Risks(tmp_path).take_stock([hostile.id, sound.id])
        supervisor = Supervisor(store, standins(store, grids))
        supervisor.start()
        assert supervisor.wait_idle(LONG_S)
        aside, finished = store.runs.get(hostile.id), store.runs.get(sound.id)
    assert aside.status == RunStatus.FAILED
    assert aside.reason == "set aside, as the server was lost 2 times while it was at this run's model"
    assert finished.status == RunStatus.FINISHED, finished.reason


def eventually(process: subprocess.Popen[Any], log: Path, is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG_S
    while not is_so():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_daemon_that_crashes_over_a_model_says_so_at_its_next_start(tmp_path: Path) -> None:
    """A segmentation fault while it loads the model; `model_s = 0`, so that no other process does."""
    state, log = tmp_path / "state", tmp_path / "log"
    config = tmp_path / "server.toml"
    config.write_text('listen = "127.0.0.1:0"\nstate = "state"\ninsecure = true\nmodel_s = 0\n')
    with Store(state) as store:
        stored = submitted(store, "tiny")
    note = state / NOTES / f"{stored.id}.json"

    def at_work() -> bool:
        try:
            return bool(json.loads(note.read_text())["at_work"])
        except (OSError, ValueError):
            return False

    for number, losses in ((signal.SIGKILL, 0), (signal.SIGSEGV, 0), (signal.SIGSEGV, 1)):
        with log.open("w") as file:
            daemon = subprocess.Popen(
                [sys.executable, "-m", "fedpeft.cli", "server", "--config", str(config)],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": PATHS},
                stderr=file,
            )
        try:
            eventually(daemon, log, lambda: "listening on" in log.read_text())
            eventually(daemon, log, at_work)
            assert json.loads(note.read_text())["losses"] == losses
            daemon.send_signal(number)
            assert daemon.wait(LONG_S) == -number
        finally:
            daemon.kill()
            daemon.wait()
    assert "Segmentation fault" in (state / CRASH).read_text()
    with Store(state) as store:
        Supervisor(store, standins(store, [])).start()
        aside = store.runs.get(stored.id)
    assert (aside.status, aside.reason[:9]) == (RunStatus.FAILED, "set aside")
