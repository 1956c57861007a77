"""Buffered rounds with agents over gRPC: by the clock as in a simulation; as they come, across a restart."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedpeft.config.run_file import run_digest
from fedpeft.config.sections import RunConfig
from fedpeft.errors import StorageError
from fedpeft.ledger import Checkpoint, Cohort
from fedpeft.ledger.records import ClientOutcome, Round
from fedpeft.rounds.buffered.in_flight import overlap_of
from fedpeft.rounds.round_context import RoundContext
from fedpeft.rounds.round_loop import initial_checkpoint, run_rounds
from fedpeft.spaces.adapter_delta import AdapterDelta
from fedpeft.stages import build_stages
from fedpeft.transport.roster import roll_call
from fedpeft.transport.tasks import Task
from fedpeft.updates.update import freeze_arrays
from fedpeft_server.store import Rules, Store, StoredRun
from fedpeft_server.store.rounds import StoredRounds
from fedpeft_server.transport.grpc_grid import RunIdentity
from tests.flower.buffered_apps import point, weight
from tests.flower.test_buffered_rounds import START, Ledger, held, run_of
from tests.server.fleet import fleet, server

CLIENTS = 6
NAMES = [f"client-{number}" for number in range(CLIENTS)]
UNITS = (1024, 724, 591, 512, 458, 418, 387, 362, 341, 324, 309)  # 1024 / sqrt(1 + staleness)


class Journal:
    """The store's rounds, of which a commit may fail."""

    def __init__(self, rounds: StoredRounds, fails_at: int | None) -> None:
        self._rounds, self._fails_at = rounds, fails_at

    def open_round(self, number: int, draw: Callable[[], Cohort]) -> Cohort:
        return self._rounds.open_round(number, draw)

    def commit(self, checkpoint: Checkpoint) -> None:
        if checkpoint.round == self._fails_at:
            raise StorageError("the machine goes down here")
        self._rounds.commit(checkpoint)

    def round_started(self, number: int, asked: int) -> None: ...

    def client_done(self, outcome: ClientOutcome) -> None: ...

    def round_done(self, row: Round) -> None: ...


def served(
    run: RunConfig,
    state: Path,
    homes: Path,
    *,
    app: str,
    fails_at: int | None = None,
    names: Sequence[str] = NAMES,
) -> None:
    """One life of a server: from where its store is to the end, or to a commit that fails."""
    with Store(state) as store:
        stored = store.runs.submit(run, Rules(), submission="one", submitter="me")
        rounds = store.rounds(stored)
        journal = Journal(rounds, fails_at)
        with (
            server(store.results, store.blobs) as running,
            fleet(running.address, names, homes, app=f"tests.flower.buffered_apps:{app}"),
        ):
            grid = running.grid(RunIdentity(stored.id, stored.digest, overlap_of(run)))
            roster = roll_call(grid, Task(stored.digest, 0, b""), expected=len(names), timeout_s=20.0)
            federation = RoundContext(
                run=run,
                digest=run_digest(run),
                grid=grid,
                roster=roster,
                space=AdapterDelta(),
                stages=build_stages(run),
                journal=journal,
                observer=journal,
                evaluate=lambda state: None,
                history=rounds,
                timeout_s=run.federation.deadline_s if run.federation.clock is None else None,
            )
            last = rounds.latest() or initial_checkpoint(federation, freeze_arrays(START))
            run_rounds(federation, last)


def committed(state: Path, run: RunConfig) -> tuple[list[Checkpoint], list[tuple[str, int]]]:
    """All checkpoints of the run, and what is accepted and not counted."""
    with Store(state) as store:
        stored: StoredRun = store.runs.submit(run, Rules(), submission="one", submitter="me")
        rounds, last = store.rounds(stored), store.rounds(stored).latest()
        assert last is not None
        return [rounds.checkpoint(number) for number in range(last.round + 1)], list(
            rounds.list_uncommitted()
        )


def replayed(checkpoints: list[Checkpoint]) -> list[dict[str, NDArray[Any]]]:
    """The states that the rows tell of, from the first: integers added up, divided and rounded once."""
    states = [dict(START)]
    for checkpoint in checkpoints[1:]:
        row, weights = checkpoint.row, 0
        total = {name: np.zeros(array.shape, dtype=np.int64) for name, array in START.items()}
        for item in row.outcomes:
            assert item.staleness is not None
            began, number = states[row.round - item.staleness - 1], int(item.client[-1])
            for name in START:
                update = (np.float32(point(number)) - began[name]) / np.float32(2)
                quanta = np.rint(update.astype(np.float64) * 2.0**36).astype(np.int64)
                total[name] = total[name] + quanta * weight(number) * UNITS[item.staleness]
            weights += weight(number) * 1024
        states.append(
            {
                name: (states[-1][name] + total[name].astype(np.float64) * 2.0**-36 / weights).astype(
                    np.float32
                )
                for name in START
            }
        )
    return states


def test_by_the_virtual_clock_agents_give_the_bytes_of_a_simulation(tmp_path: Path) -> None:
    run = run_of(4, {"size": 2, "concurrency": 5})
    served(run, tmp_path / "state", tmp_path / "homes", app="unequal")
    there, _ = committed(tmp_path / "state", run)
    here: Ledger = held(run, clients=CLIENTS)
    assert [checkpoint.row.outcomes for checkpoint in there] == [row.outcomes for row in here.rows]
    for checkpoint in there:
        mine = here.read(checkpoint.round)
        assert {n: a.tobytes() for n, a in checkpoint.state.items()} == {
            n: a.tobytes() for n, a in mine.state.items()
        }


def test_in_order_of_arrival_and_across_a_restart_nothing_is_lost_or_counted_twice(tmp_path: Path) -> None:
    run = run_of(8, {"size": 2, "concurrency": 5, "max_staleness": 10}, clock=None)
    with pytest.raises(StorageError, match="goes down"):
        served(run, tmp_path / "state", tmp_path / "homes", app="unequal", fails_at=4)
    before, accepted = committed(tmp_path / "state", run)
    assert len(before) == 4
    assert len(accepted) >= 2, "a full buffer was durable when the commit failed"
    served(run, tmp_path / "state", tmp_path / "homes", app="unequal")
    after, _ = committed(tmp_path / "state", run)
    assert len(after) == 9
    rows = [checkpoint.row for checkpoint in after]
    tasks = [(item.client, row.round - (item.staleness or 0)) for row in rows for item in row.outcomes]
    assert len(set(tasks)) == len(tasks)
    assert [item for row in rows for item in row.outcomes if item.status != "folded"] == []
    first = list(itertools.islice((task for row in rows[4:] for task in _tasks(row)), len(accepted)))
    assert first == accepted, "what was durable comes first, in the order in which it was accepted"
    for checkpoint, state in zip(after, replayed(after), strict=True):
        assert {n: a.tobytes() for n, a in checkpoint.state.items()} == {
            n: a.tobytes() for n, a in state.items()
        }
    assert any(item.staleness for row in rows for item in row.outcomes), "some of them took longer"


def _tasks(row: Round) -> list[tuple[str, int]]:
    return [(item.client, row.round - (item.staleness or 0)) for item in row.outcomes]


def test_who_does_not_answer_within_the_deadline_is_not_waited_for(tmp_path: Path) -> None:
    run = run_of(1, {"size": 6, "concurrency": 6}, clock=None, deadline_s=1.5)
    served(run, tmp_path / "state", tmp_path / "homes", app="one_sleeps")
    row = committed(tmp_path / "state", run)[0][-1].row
    outcomes = {item.client: item for item in row.outcomes}
    assert outcomes.keys() == set(NAMES)
    assert (outcomes["client-5"].status, outcomes["client-5"].reason) == ("late", "no answer in 1.5 s")
    folded = sum(item.status == "folded" for item in row.outcomes)
    assert row.notes == (f"the round ended with {folded} of 6 updates: nobody was left",)
