"""The round loop on our grid, with clients that behave and clients that don't."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedpeft.config.run_file import build_run, run_digest
from fedpeft.errors import FederationError, TrainingError
from fedpeft.flower.local_grid import LocalGrid
from fedpeft.ledger import Checkpoint, Cohort
from fedpeft.ledger.records import ClientOutcome, Round
from fedpeft.rounds.round_context import RoundContext
from fedpeft.rounds.round_loop import initial_checkpoint, run_rounds
from fedpeft.spaces.adapter_delta import AdapterDelta
from fedpeft.stages import build_stages
from fedpeft.transport.roster import roll_call
from fedpeft.transport.tasks import Task
from fedpeft.updates.update import freeze_arrays
from fedpeft.workers import InlineWorkers, ProcessWorkers, Workers
from tests.flower.apps import MISBEHAVIOUR

APPS = "tests.flower.apps"
START = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(1, dtype=np.float32)}


class Recorder:
    """A journal and an observer that keep everything."""

    def __init__(self) -> None:
        self.checkpoints: list[Checkpoint] = []
        self.outcomes: list[ClientOutcome] = []

    def open_round(self, number: int, draw: Callable[[], Cohort]) -> Cohort:
        return draw()

    def commit(self, checkpoint: Checkpoint) -> None:
        self.checkpoints.append(checkpoint)

    def round_started(self, number: int, asked: int) -> None: ...

    def client_done(self, outcome: ClientOutcome) -> None:
        self.outcomes.append(outcome)

    def round_done(self, row: Round) -> None: ...


def held(
    app: str, workers: Workers, *, clients: int = 4, rounds: int = 2, **federation: Any
) -> tuple[Recorder, LocalGrid]:
    """Hold a run with an app of `tests.flower.apps`."""
    tables = {"run": {"name": "t", "rounds": rounds}, "federation": federation}
    run = build_run(tables, source="test")
    digest, recorder = run_digest(run), Recorder()
    grid = LocalGrid(clients, workers, f"{APPS}:{app}")
    task = Task(digest, 0, b"")
    roster = roll_call(grid, task, expected=clients)
    federation_ = RoundContext(
        run=run,
        digest=digest,
        grid=grid,
        roster=roster,
        space=AdapterDelta(),
        stages=build_stages(run),
        journal=recorder,
        observer=recorder,
        evaluate=lambda state: None,
        memory=grid,
    )
    run_rounds(federation_, initial_checkpoint(federation_, freeze_arrays(START)))
    return recorder, grid


def test_honest_rounds_add_what_clients_send() -> None:
    recorder, _ = held("all_honest", InlineWorkers(), rounds=3)
    assert [checkpoint.round for checkpoint in recorder.checkpoints] == [0, 1, 2, 3]
    for name, start in START.items():
        np.testing.assert_array_equal(recorder.checkpoints[-1].state[name], start + 3)
    row = recorder.checkpoints[-1].row
    assert row.train_loss == 0.5
    assert row.state_norm_change == pytest.approx(np.sqrt(7.0))
    assert [outcome.update_norm for outcome in row.outcomes] == [pytest.approx(np.sqrt(7.0))] * 4
    assert all(outcome.examples == 24 and outcome.bytes_up > 28 for outcome in row.outcomes)


@pytest.mark.parametrize("name", sorted(MISBEHAVIOUR))
def test_one_misbehaving_client_changes_nothing_for_the_others(name: str) -> None:
    recorder, _ = held(f"with_{name.replace('-', '_')}", InlineWorkers(), rounds=1)
    for array_name, start in START.items():
        np.testing.assert_array_equal(recorder.checkpoints[-1].state[array_name], start + 1)
    outcomes = {outcome.client: outcome for outcome in recorder.checkpoints[-1].row.outcomes}
    status = MISBEHAVIOUR[name][1]
    assert outcomes["client-1"].status == status
    assert bool(outcomes["client-1"].reason) == (status != "folded")
    assert "\n" not in outcomes["client-1"].reason
    assert recorder.checkpoints[-1].row.train_loss == 0.5
    assert [outcomes[f"client-{n}"].status for n in (0, 2, 3)] == ["folded"] * 3


def test_a_deadline_without_a_virtual_clock_does_not_make_a_simulation_hurry() -> None:
    recorder, _ = held("all_honest", InlineWorkers(), rounds=1, deadline_s=1e-9)
    assert [outcome.status for outcome in recorder.checkpoints[-1].row.outcomes] == ["folded"] * 4


def test_no_quorum_stops_the_run_with_the_clients_own_error() -> None:
    with pytest.raises(
        TrainingError, match=r"round 1: 0 of 4 clients counted, the quorum is 2; client-0: the training loss"
    ):
        held("everyone_fails", InlineWorkers())


def test_quorum_of_all() -> None:
    with pytest.raises(FederationError, match="3 of 4 clients counted, the quorum is 4"):
        held("with_crashing", InlineWorkers(), quorum=1.0)


def test_worker_processes_give_the_same_checkpoints_and_keep_client_memory() -> None:
    inline, grid = held("all_honest", InlineWorkers())
    workers = ProcessWorkers(2)
    try:
        parallel, _ = held("all_honest", workers)
    finally:
        workers.close()
    for one, two in zip(inline.checkpoints, parallel.checkpoints, strict=True):
        assert {n: a.tobytes() for n, a in one.state.items()} == {
            n: a.tobytes() for n, a in two.state.items()
        }
        assert {n: a.tobytes() for n, a in one.clients.items()} == {
            n: a.tobytes() for n, a in two.clients.items()
        }
        assert [o.model_dump() for o in one.row.outcomes] == [o.model_dump() for o in two.row.outcomes]
    asked = {name: int(array[0]) for name, array in inline.checkpoints[-1].clients.items()}
    assert asked == {f"{node}/asked": 2 for node in range(1, 5)}
    grid.restore_memory(inline.checkpoints[1].clients)
    assert {name: int(array[0]) for name, array in grid.memory().items()} == dict.fromkeys(asked, 1)


def test_sampling_asks_the_cohort_only_and_repeats_itself() -> None:
    sampling = {"kind": "fixed", "cohort": 2}
    first, _ = held("all_honest", InlineWorkers(), rounds=6, sampling=sampling)
    second, _ = held("all_honest", InlineWorkers(), rounds=6, sampling=sampling)
    cohorts = [tuple(o.client for o in c.row.outcomes) for c in first.checkpoints[1:]]
    assert all(len(cohort) == 2 for cohort in cohorts)
    assert len(set(cohorts)) > 1
    assert cohorts == [tuple(o.client for o in c.row.outcomes) for c in second.checkpoints[1:]]


def test_an_empty_poisson_cohort_is_a_round_that_changes_nothing() -> None:
    recorder, _ = held("all_honest", InlineWorkers(), rounds=12, sampling={"kind": "poisson", "rate": 0.1})
    empty = [c for c in recorder.checkpoints[1:] if not c.row.outcomes]
    assert empty, "with a rate of 0.1 and four clients two of three rounds are empty"
    assert all(checkpoint.row.notes for checkpoint in empty)
    for before, after in zip(recorder.checkpoints, recorder.checkpoints[1:], strict=False):
        moved = not np.array_equal(before.state["a"], after.state["a"])
        assert moved == bool(after.row.outcomes)


def test_the_virtual_clock_loses_the_late_and_the_vanished() -> None:
    clock = {"speed_sigma": 1.0, "dropout": 0.2, "availability": 0.9, "examples_per_s": 1.0}
    recorder, _ = held(
        "all_honest", InlineWorkers(), clients=12, rounds=8, clock=clock, deadline_s=25.0, quorum=0.0
    )
    outcomes = [outcome for checkpoint in recorder.checkpoints for outcome in checkpoint.row.outcomes]
    assert {"folded", "dropped", "late"} <= {outcome.status for outcome in outcomes}
    for outcome in outcomes:
        if outcome.status == "folded":
            assert outcome.virtual_s is not None
            assert outcome.virtual_s <= 25.0
        if outcome.status == "late":
            assert outcome.virtual_s is not None
            assert outcome.virtual_s > 25.0
    lengths = {checkpoint.row.virtual_s for checkpoint in recorder.checkpoints[1:]}
    assert all(length is not None and length <= 25.0 for length in lengths)


def test_over_selection_keeps_the_quickest() -> None:
    options: dict[str, Any] = {
        "clock": {"speed_sigma": 1.0, "examples_per_s": 1.0},
        "sampling": {"kind": "fixed", "cohort": 4},
        "over_selection": 0.5,
    }
    recorder, _ = held("all_honest", InlineWorkers(), clients=12, rounds=4, **options)
    for checkpoint in recorder.checkpoints[1:]:
        times: dict[str, list[float]] = {"folded": [], "late": []}
        for outcome in checkpoint.row.outcomes:
            assert outcome.virtual_s is not None
            times[outcome.status].append(outcome.virtual_s)
        kept, late = times["folded"], times["late"]
        assert len(kept) == 4
        assert len(late) == 2
        assert max(kept) <= min(late)
        assert checkpoint.row.virtual_s == max(kept)
