"""Models in a process of their own: the daemon imports none of what they stand on, and no byte differs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from fedpeft.config.run_file import build_run, run_digest
from fedpeft.config.sections import RunConfig
from fedpeft.errors import RunFileError
from fedpeft.participant.load_simulation import load_simulated_run
from fedpeft.participant.loaded_run import add_loaded_run, drop_loaded_run
from fedpeft.spaces.directions import SUPPORTS
from fedpeft.spaces.seed_options import SUPPORTED_RULES
from fedpeft_server.runs.model_host import counts_alone
from fedpeft_server.runs.model_process_pool import ModelProcess, ModelProcessPool
from fedpeft_server.runs.supervisor import Supervisor
from fedpeft_server.store import Rules, RunStatus, Store, StoredRun
from tests.server.in_memory_grid import InMemoryGrid, standins

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "peft", "dp_accounting", "bitsandbytes", "opacus")
LONG_S = 240.0


def tables(**parts: Any) -> dict[str, Any]:
    """Four clients, two rounds of a step each, every round evaluated."""
    return {
        "run": {"name": "tiny", "rounds": 2},
        "peft": {"method": "lora", "r": 2},
        "data": {"limit": 32, "max_length": 64, "partitioner": {"kind": "iid", "clients": 4}},
        "training": {"steps": 1, "batch_size": 4},
        "evaluation": {"bootstrap": 2, "metrics": ["token-accuracy"], "max_examples": 2, "baselines": True},
        **parts,
    }


TRAINING: dict[str, Any] = {
    "kind": "zeroth-order",
    "rule": "zo-sgd",
    "steps": 2,
    "batch_size": 2,
    "lr": 1e-3,
}
SEEDS: dict[str, Any] = {
    "peft": {"method": "full"},
    "space": {"kind": "seed-scalars", "num_seeds": 16},
    "training": TRAINING,
}


def test_a_daemon_that_holds_rounds_imports_nothing_that_models_stand_on() -> None:
    script = (
        "import sys\nfrom fedpeft_server.ops import daemon\n"
        "from fedpeft_server.runs import hosting, subprocess_host\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "server", "client"))
    said = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("parts", "alone"),
    [
        ({}, True),
        (SEEDS, True),
        ({**SEEDS, "training": {**TRAINING, "rule": "sparse", "density": 0.5}}, False),
        ({"space": {"kind": "projected", "num_seeds": 16}}, False),
        ({"federation": {"lora_rule": "flora"}}, False),
        ({"output": {"tensorboard": True}}, False),
    ],
)
def test_which_rounds_are_held_without_the_model(parts: dict[str, Any], alone: bool) -> None:
    assert counts_alone(build_run(tables(**parts), source="test")) == alone


def test_the_rules_whose_directions_move_some_weights_only() -> None:
    assert frozenset(SUPPORTS) == SUPPORTED_RULES


@pytest.fixture(scope="module")
def room() -> Iterator[ModelProcessPool]:
    with closing(ModelProcessPool(60.0)) as made:
        yield made


def held(folder: Path, run: RunConfig, models: ModelProcessPool | None) -> tuple[Store, StoredRun]:
    """The run on a daemon of its own, to its end; agents work in this process."""
    grids: list[InMemoryGrid] = []
    with Store(folder) as store:
        supervisor = Supervisor(store, standins(store, grids), models=models)
        if models is not None:
            add_loaded_run(load_simulated_run(run))  # for the agents; the daemon has it elsewhere
        try:
            stored = supervisor.submit(run, Rules(), submission="one", submitter="me")
            assert supervisor.wait_idle(LONG_S), supervisor.get(stored.id)
        finally:
            drop_loaded_run(run_digest(run))
        return store, store.runs.get(stored.id)


def records(store: Store, run: StoredRun) -> list[dict[str, Any]]:
    """The run's rows, without the times."""
    from fedpeft.ledger import RunFolder

    with RunFolder.resume(store.run_folder(run.id)) as folder:
        return [row.model_dump(exclude={"wall_s", "peak_rss_mib", "outcomes"}) for row in folder.rows()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "parts", [pytest.param({}, marks=pytest.mark.exhaustive, id="deltas"), pytest.param(SEEDS, id="seeds")]
)
def test_a_model_elsewhere_changes_no_byte(
    parts: dict[str, Any], room: ModelProcessPool, tmp_path: Path
) -> None:
    run = build_run(tables(**parts), source="test")
    there, apart = held(tmp_path / "apart", run, room)
    here, beside = held(tmp_path / "here", run, None)
    assert (apart.status, beside.status) == (RunStatus.FINISHED, RunStatus.FINISHED), (
        apart.reason,
        beside.reason,
    )
    assert apart.adapter_digest == beside.adapter_digest
    assert records(there, apart) == records(here, beside)
    assert (there.run_folder(apart.id) / "report.html").is_file()


@pytest.mark.slow
def test_a_run_that_goes_on_is_copied_as_of_its_last_commit(room: ModelProcessPool, tmp_path: Path) -> None:
    run, copy = build_run(tables(), source="test"), tmp_path / "copy"
    grids: list[InMemoryGrid] = []
    with Store(tmp_path / "state") as store:
        supervisor = Supervisor(store, standins(store, grids, hold_after=5), models=room)
        add_loaded_run(load_simulated_run(run))
        try:
            stored = supervisor.submit(run, Rules(), submission="one", submitter="me")
            deadline = time.monotonic() + LONG_S
            while not (grids and grids[0].held.is_set()):  # in round 2
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert supervisor.snapshot(stored.id, copy) == 1
            grids[0].hold_after = None
            assert supervisor.wait_idle(LONG_S)
        finally:
            drop_loaded_run(run_digest(run))
        state = store.rounds(store.runs.get(stored.id)).checkpoint(1).state
    adapter = load_file(copy / "adapter" / "adapter_model.safetensors")
    assert {tensor.tobytes() for tensor in adapter.values()} == {part.tobytes() for part in state.values()}


@pytest.mark.slow
def test_a_run_file_is_checked_there_and_every_problem_comes_back(room: ModelProcessPool) -> None:
    wrong = build_run(
        tables(peft={"method": "lora", "surprise": 1}, stages=[{"kind": "nothing"}]), source="test"
    )
    with pytest.raises(RunFileError) as caught:
        room.check(wrong)
    assert len(caught.value.problems) == 2
    room.check(build_run(tables(), source="test"))


@pytest.mark.slow
def test_a_process_that_was_killed_is_started_anew_and_costs_the_run_nothing_but_time(
    room: ModelProcessPool, tmp_path: Path
) -> None:
    run = build_run(tables(), source="test")
    ended = threading.Event()

    def kill_once() -> None:
        """Once round 0 is evaluated there."""
        while not ended.wait(0.02):
            taken = [process for process in tuple(room._taken) if process.pid is not None]
            if taken and any((tmp_path / "apart").glob("runs/*/metrics.jsonl")):
                os.kill(taken[0].pid or 0, signal.SIGKILL)
                return

    killer = threading.Thread(target=kill_once)
    killer.start()
    try:
        _, stored = held(tmp_path / "apart", run, room)
    finally:
        ended.set()
        killer.join()
    assert stored.status == RunStatus.FINISHED, stored.reason
    _, beside = held(tmp_path / "here", run, None)
    assert stored.adapter_digest == beside.adapter_digest


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_process_without_work_goes_and_comes_back_when_there_is_some() -> None:
    process = ModelProcess(0.2, LONG_S)
    run = build_run(tables(), source="test")
    from fedpeft.config.run_file import run_json

    with closing(process):
        process.ask("check", {"run": run_json(run)})
        first = process.pid
        deadline = time.monotonic() + LONG_S
        while process.pid is not None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert process.pid is None
        process.ask("check", {"run": run_json(run)})
        assert process.pid not in (None, first)
