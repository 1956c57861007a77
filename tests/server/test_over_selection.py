"""Over-selected rounds whose answers come in real time: the first so many count, also across a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from numpy.typing import NDArray

from fedpeft.config.run_file import build_run
from fedpeft.config.sections import RunConfig
from fedpeft.errors import StorageError
from fedpeft.ledger import Cohort
from fedpeft.ledger.records import Round
from fedpeft.transport.tasks import TRAIN
from fedpeft_server.store import Rules, Store
from fedpeft_server.transport.grpc_grid import GrpcGrid, RunIdentity
from tests.flower.buffered_apps import point, weight
from tests.flower.test_buffered_rounds import START
from tests.server.fleet import answer, fleet, messages, server, wait_for
from tests.server.test_buffered_federation import committed, served

NAMES = [f"client-{number}" for number in range(5)]
SPARE = "not needed: 3 others had answered"


def run_of(rounds: int) -> RunConfig:
    """Five are asked and three count."""
    sampling = {"kind": "fixed", "cohort": 3}
    tables = {
        "run": {"name": "t", "rounds": rounds},
        "federation": {"sampling": sampling, "over_selection": 0.6},
    }
    return build_run(tables, source="test")


def statuses(row: Round) -> dict[str, str]:
    return {outcome.client: outcome.status for outcome in row.outcomes}


def after(rounds: int, numbers: list[int]) -> dict[str, NDArray[Any]]:
    """The state when the same clients were counted in every round; see `tests.flower.buffered_apps`."""
    state = dict(START)
    for _ in range(rounds):
        total = {name: np.zeros(array.shape, dtype=np.int64) for name, array in state.items()}
        for number in numbers:
            for name, array in state.items():
                update = (np.float32(point(number)) - array) / np.float32(2)
                total[name] += np.rint(update.astype(np.float64) * 2.0**36).astype(np.int64) * weight(number)
        counted = sum(weight(number) for number in numbers)
        state = {
            name: (array + total[name].astype(np.float64) * 2.0**-36 / counted).astype(np.float32)
            for name, array in state.items()
        }
    return state


def test_the_first_to_answer_count_and_the_others_are_released(tmp_path: Path) -> None:
    served(run_of(3), tmp_path / "state", tmp_path / "homes", app="three_quick", names=NAMES)
    rows, waiting = committed(tmp_path / "state", run_of(3))
    assert waiting == []
    for checkpoint in rows[1:]:
        assert statuses(checkpoint.row) == dict.fromkeys(NAMES[:3], "folded") | dict.fromkeys(
            NAMES[3:], "late"
        )
        assert {item.reason for item in checkpoint.row.outcomes if item.status == "late"} == {SPARE}
    for name, array in after(3, [0, 1, 2]).items():
        assert rows[-1].state[name].tobytes() == array.tobytes()
    assert list(tmp_path.glob("homes/*/outbox/*.result")) == []


def test_a_restart_counts_those_who_had_answered_though_others_are_quicker_now(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="goes down"):
        served(run_of(2), tmp_path / "state", tmp_path / "homes", app="three_quick", names=NAMES, fails_at=2)
    _, waiting = committed(tmp_path / "state", run_of(2))
    assert {agent for agent, number in waiting} == set(NAMES[:3])
    served(run_of(2), tmp_path / "state", tmp_path / "homes", app="two_quick", names=NAMES)
    rows, _ = committed(tmp_path / "state", run_of(2))
    assert [name for name, status in statuses(rows[2].row).items() if status == "folded"] == NAMES[:3]
    for name, array in after(2, [0, 1, 2]).items():
        assert rows[2].state[name].tobytes() == array.tobytes()


def test_an_unsound_answer_takes_nobodys_place(tmp_path: Path) -> None:
    served(run_of(2), tmp_path / "state", tmp_path / "homes", app="one_garbled", names=NAMES)
    for checkpoint in committed(tmp_path / "state", run_of(2))[0][1:]:
        found = statuses(checkpoint.row)
        assert found.pop("client-0") in ("refused", "late")  # late: three others were quicker
        assert found == dict.fromkeys(NAMES[1:4], "folded") | {"client-4": "late"}


def test_an_answer_without_a_place_waits_at_its_agent(tmp_path: Path) -> None:
    """One place and two answers: the second one is sent again when the place is free, or never wanted."""
    with Store(tmp_path / "state") as store:
        stored = store.runs.submit(run_of(1), Rules(), submission="one", submitter="me")
        asked = Cohort(("ann", "bob"), {"ann": 0.0, "bob": 0.0}, places=1)
        store.rounds(stored).open_round(1, lambda: asked)
        with (
            server(store.results, store.blobs) as running,
            fleet(running.address, ["ann", "bob"], tmp_path / "homes"),
        ):
            grid = running.grid(RunIdentity(stored.id, stored.digest))
            ids = list(grid.push_messages(messages(grid, ["ann", "bob"], run=stored.digest)))
            (first,) = _one(grid, ids)
            wait_for(lambda: store.runs.refusals(stored.id) == {"spare": 1})
            assert list(grid.pull_messages(ids)) == []
            assert len(list(tmp_path.glob("homes/*/outbox/*.result"))) == 1
            taken = answer(first)["client"]
            grid.free_place(1, str(taken))
            (second,) = _one(grid, ids)
            assert {taken, answer(second)["client"]} == {"ann", "bob"}
            assert len(store.results.recall(stored.id, 1, TRAIN)) == 2
            wait_for(lambda: not list(tmp_path.glob("homes/*/outbox/*.result")))


def _one(grid: GrpcGrid, ids: list[str]) -> list[Message]:
    came: list[Message] = []

    def some() -> bool:
        came.extend(grid.pull_messages(ids))
        return bool(came)

    wait_for(some)
    return came
