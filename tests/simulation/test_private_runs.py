"""Whole private runs of a tiny federation: from the run file to the report."""

from __future__ import annotations

import copy
import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedpeft.config.run_file import build_run, run_digest, run_json, run_toml
from fedpeft.errors import PrivacyError
from fedpeft.flower.local_grid import LocalGrid
from fedpeft.flower.server_app import Order
from fedpeft.ledger import Checkpoint, Cohort, RunFolder
from fedpeft.ledger.folder_rounds import FolderRounds
from fedpeft.ledger.records import Round, Started
from fedpeft.privacy.accountant import epsilon
from fedpeft.privacy.budget import BudgetLedger
from fedpeft.privacy.events import ClientLevel, Event, Local, PersonLevel, RecordLevel
from fedpeft.reporting.progress import make_progress
from fedpeft.simulation.engine import serve, simulate
from fedpeft.transport.roster import roll_call
from fedpeft.transport.tasks import Task
from fedpeft.workers import InlineWorkers
from tests.simulation.runs import fingerprint, resumed, simulated

DELTA = 1e-3
PROMISE = {"noise_multiplier": 1.0, "target_delta": DELTA, "max_epsilon": 100.0}
CLIENT_LEVEL = {"kind": "client-level", "clip_norm": 0.5, **PROMISE}
RECORD_LEVEL = {
    "kind": "record-level",
    "max_grad_norm": 1.0,
    "sample_rate": 0.3,
    "expected_batch_size": 5,
    **PROMISE,
}
LOCAL = {"kind": "local", "clip_norm": 0.5, **PROMISE}


def private(tables: dict[str, Any], privacy: dict[str, Any], **more: Any) -> dict[str, Any]:
    federation = {"weighting": "uniform", "sampling": {"kind": "poisson", "rate": 0.5}}
    return {**copy.deepcopy(tables), "federation": federation, "privacy": {**privacy, **more}}


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def epsilons(out: Path) -> list[float]:
    return [row["epsilon"] for row in rows(out) if row["event"] == "round"]


def test_a_client_level_run_tells_epsilon_and_nothing_of_its_clients(
    tables: dict[str, Any], tmp_path: Path
) -> None:
    result = simulated(private(tables, CLIENT_LEVEL), tmp_path)
    event = ClientLevel(noise_multiplier=1.0, sample_rate=0.5)
    assert epsilons(tmp_path) == [0.0, *(epsilon([event] * n, DELTA) for n in (1, 2, 3))]
    with RunFolder.resume(tmp_path) as folder:
        started, *others = folder.rows()
    assert isinstance(started, Started)
    assert set(started.clients.values()) == {0}
    assert started.cut_rows == 0
    assert started.privacy is not None
    assert started.privacy.neighbours == event.neighbours
    for row in others:
        if isinstance(row, Round):
            assert not row.outcomes
            assert (row.train_loss, row.virtual_s, row.wall_s, row.up, row.down) == (
                None,
                None,
                0.0,
                None,
                None,
            )
            assert row.evaluation is not None
            assert row.evaluation.clients == {}
    assert result.summary.epsilon == epsilons(tmp_path)[-1]
    page = (tmp_path / "report.html").read_text()
    assert "adding or removing one client" in page
    assert "Epsilon spent, by round" in page
    assert "NOT PRIVATE" not in page
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_secret_noise_makes_two_runs_of_one_file_differ_and_seeded_noise_does_not(
    tables: dict[str, Any], tmp_path: Path
) -> None:
    tables["run"]["rounds"] = 1
    for name, seeded in (("a", False), ("b", False), ("c", True), ("d", True)):
        simulated(private(tables, CLIENT_LEVEL, seeded=seeded), tmp_path / name)
    prints = {name: fingerprint(tmp_path / name) for name in "abcd"}
    assert prints["a"]["adapter"] != prints["b"]["adapter"]
    assert prints["c"] == prints["d"]
    assert "THIS RUN IS NOT PRIVATE" in (tmp_path / "c" / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("privacy", [CLIENT_LEVEL, RECORD_LEVEL, LOCAL], ids=lambda p: str(p["kind"]))
def test_seeded_runs_give_the_same_bytes_with_any_number_of_workers(
    tables: dict[str, Any], tmp_path: Path, privacy: dict[str, Any]
) -> None:
    for workers in (1, 2):
        simulated(private(tables, privacy, seeded=True), tmp_path / str(workers), workers=workers)
    assert fingerprint(tmp_path / "1") == fingerprint(tmp_path / "2")


def test_a_run_stopped_by_its_budget_is_finished(tables: dict[str, Any], tmp_path: Path) -> None:
    event = ClientLevel(noise_multiplier=1.0, sample_rate=0.5)
    limit = epsilon([event] * 2, DELTA) * 1.0001
    tables["evaluation"]["every"] = 3
    result = simulated(private(tables, CLIENT_LEVEL, max_epsilon=limit), tmp_path)
    assert result.summary.rounds_done == 2
    last = rows(tmp_path)[-1]
    assert last["event"] == "finished"
    assert last["stopped"].startswith("stopped by budget after round 2")
    assert (
        rows(tmp_path)[-2]["evaluation"] is not None
    )  # the last state is measured, though 3 rounds were due
    assert "stopped by budget after round 2" in (tmp_path / "report.html").read_text()
    before = fingerprint(tmp_path)
    resumed(tmp_path)
    assert fingerprint(tmp_path) == before


class DyingError(Exception):
    """The process is gone."""


class Dying:
    """Rounds in a folder, until the second one's commit."""

    resumes = False

    def __init__(self, inner: FolderRounds) -> None:
        self._inner = inner

    def open_round(self, number: int, draw: Callable[[], Cohort]) -> Cohort:
        return draw()

    def commit(self, checkpoint: Checkpoint) -> None:
        if checkpoint.round == 2:
            raise DyingError
        self._inner.commit(checkpoint)

    def latest(self) -> Checkpoint | None:
        return self._inner.latest()

    def checkpoint(self, number: int) -> Checkpoint:
        return self._inner.checkpoint(number)

    def list_uncommitted(self) -> Sequence[tuple[str, int]]:
        return self._inner.list_uncommitted()

    def read_spent_ledger(self) -> str | None:
        return self._inner.read_spent_ledger()

    def commit_spent(self, ledger: str) -> None:
        self._inner.commit_spent(ledger)


def test_a_run_killed_between_spend_and_commit_goes_on_and_has_paid_for_both(
    tables: dict[str, Any], tmp_path: Path
) -> None:
    run = build_run(private(tables, CLIENT_LEVEL), source="test")
    inner = FolderRounds(tmp_path / "checkpoints", tmp_path / "privacy.json", run_digest(run), None)
    with (
        RunFolder.create(tmp_path, run, rounds=Dying(inner)) as folder,
        make_progress("quiet") as progress,
        pytest.raises(DyingError),
    ):
        simulate(folder, workers=1, engine="local", progress=progress)
    resumed(tmp_path)
    spent = BudgetLedger.from_json((tmp_path / "privacy.json").read_text())
    once = ClientLevel(noise_multiplier=1.0, sample_rate=0.5)
    twice = ClientLevel(noise_multiplier=1.0, sample_rate=0.5, draws=2)
    assert [events for _, events in sorted(spent.charges.items())] == [(once,), (twice,), (once,)]
    assert epsilons(tmp_path)[-1] == epsilon([once, twice, once], DELTA)


PEOPLE = 6


def rows_of_people(path: Path) -> str:
    """Forty rows of six people, in one file that two clients share."""
    path.write_text(
        "".join(
            json.dumps({"q": f"say {i}", "a": str(i % 7), "who": f"p{i % PEOPLE}"}) + "\n" for i in range(40)
        )
    )
    return str(path)


@pytest.mark.parametrize(
    ("privacy", "user", "event"),
    [
        (LOCAL, None, Local(noise_multiplier=1.0)),
        (RECORD_LEVEL, None, RecordLevel(noise_multiplier=1.0, sample_rate=0.3, steps=2)),
        (RECORD_LEVEL, "who", PersonLevel(noise_multiplier=1.0, sample_rate=0.3, steps=2)),
    ],
    ids=["local", "record-level", "person-level"],
)
def test_clients_that_add_their_own_noise(
    tables: dict[str, Any], tmp_path: Path, privacy: dict[str, Any], user: str | None, event: Event
) -> None:
    """Scores come from a test set of the run's own only; the server learns no loss and no number of rows."""
    tables["data"] = {
        "train": rows_of_people(tmp_path / "rows.jsonl"),
        "prompt": "{q}: ",
        "answer": "{a}",
        "partitioner": {"kind": "iid", "clients": 2},
        **({} if user is None else {"user": user}),
    }
    made = private(tables, privacy)
    made["federation"]["sampling"] = {"kind": "all"}
    simulated(made, tmp_path / "run")
    assert epsilons(tmp_path / "run") == [0.0, *(epsilon([event] * n, DELTA) for n in (1, 2, 3))]
    for row in rows(tmp_path / "run"):
        if row["event"] == "round":
            assert row["evaluation"] is None
            assert all(item["loss"] is None and item["examples"] == 0 for item in row["outcomes"])
            assert len(row["outcomes"]) == (2 if row["round"] else 0)
            assert all(item["status"] == "folded" for item in row["outcomes"])
    page = html.unescape((tmp_path / "run" / "report.html").read_text())
    assert "nothing was scored" in page
    assert event.neighbours in page


def test_flwr_run_refuses_seeded_noise_before_it_loads_anything(
    tables: dict[str, Any], tmp_path: Path
) -> None:
    run = build_run(private(tables, CLIENT_LEVEL, seeded=True), source="test")
    file = tmp_path / "run.toml"
    file.write_text(run_toml(run))
    grid = LocalGrid(4, InlineWorkers(), "fedpeft.flower.client_app:node_app")
    with pytest.raises(PrivacyError, match="not a simulation"):
        serve(Order(grid, file, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(PrivacyError, match="'privacy'"):  # and so do clients, whatever their server does
        roll_call(grid, Task(run_digest(run), 0, b"", run_json(run)), expected=4)


def test_private_seed_scalars(tables: dict[str, Any], tmp_path: Path) -> None:
    """A few noised scalars per step; the model is rebuilt from their sums as in any seed-scalar run."""
    made = private(tables, RECORD_LEVEL)
    made["training"] = {"kind": "zeroth-order", "steps": 4, "lr": 1e-3}
    made["space"] = {"kind": "seed-scalars", "mode": "common", "num_seeds": 4}
    made["federation"]["sampling"] = {"kind": "all"}
    simulated(made, tmp_path)
    event = RecordLevel(noise_multiplier=1.0, sample_rate=0.3, steps=4)
    assert epsilons(tmp_path) == [0.0, *(epsilon([event] * n, DELTA) for n in (1, 2, 3))]
    statuses = {
        item["status"] for row in rows(tmp_path) if row["event"] == "round" for item in row["outcomes"]
    }
    assert statuses == {"folded"}


def test_client_level_privacy_of_seed_scalars(tables: dict[str, Any], tmp_path: Path) -> None:
    """The round's vector of scalars is clipped, and released once: the bound is in quanta."""
    made = private(tables, CLIENT_LEVEL, clip_norm=2000.0)
    made["training"] = {"kind": "zeroth-order", "steps": 4, "lr": 1e-3}
    made["space"] = {"kind": "seed-scalars", "mode": "common", "num_seeds": 4}
    simulated(made, tmp_path)
    event = ClientLevel(noise_multiplier=1.0, sample_rate=0.5)
    assert epsilons(tmp_path)[-1] == epsilon([event] * 3, DELTA)
