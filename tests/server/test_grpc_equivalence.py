"""A run over gRPC, whose agents are processes of their own, ends in the bytes that LocalGrid gives."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fedpeft.config.device_task import device_task
from fedpeft.config.run_file import build_run
from fedpeft.config.sections import RunConfig
from fedpeft.data.embedded import make_federated_rows
from fedpeft.flower.local_grid import LocalGrid
from fedpeft.flower.server_app import RoundServer, execute_rounds
from fedpeft.ledger import Checkpoint, Cohort
from fedpeft.ledger.records import ClientOutcome, Round
from fedpeft.participant.load_server import load_serving_run
from fedpeft.participant.load_simulation import load_simulated_run
from fedpeft.participant.loaded_run import LoadedRun, set_loaded_run
from fedpeft.transport.roster import Roster, roll_call
from fedpeft.transport.tasks import Task
from fedpeft.updates.update import arrays_digest
from fedpeft.workers import InlineWorkers
from fedpeft_server.transport.grpc_grid import RunIdentity
from tests.server.fleet import server

SITES = ("site-0", "site-1", "site-2")
FEEDBACK = [{"kind": "top-k", "density": 0.1, "error_feedback": True}]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """One file of rows for each site, and a test set."""
    train, test = make_federated_rows(0, len(SITES), 40, 4)
    (tmp_path / "train").mkdir()
    for number, site in enumerate(SITES):
        lines = [json.dumps(asdict(row)) for row in train if row.client == number]
        (tmp_path / "train" / f"{site}.jsonl").write_text("\n".join(lines[: 40 - 7 * number]) + "\n")
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(asdict(row)) + "\n" for row in test))
    return tmp_path


def run_of(rows: Path, train: Path, **tables: Any) -> RunConfig:
    base: dict[str, Any] = {
        "run": {"name": "same", "rounds": 3},
        "peft": {"method": "lora", "r": 2, "lora_dropout": 0.1},
        "data": {
            "train": str(train),
            "test": str(rows / "test.jsonl"),
            "prompt": "{prompt}",
            "answer": "{answer}",
            "max_length": 128,
            "partitioner": {"kind": "files"},
        },
        "training": {"steps": 2, "batch_size": 8, "lr": 7e-3},
    }
    return build_run(base | tables, source="test")


class Notes:
    """A journal and an observer that keep what is committed."""

    def __init__(self) -> None:
        self.committed: list[Checkpoint] = []

    def open_round(self, number: int, draw: Callable[[], Cohort]) -> Cohort:
        return draw()

    def commit(self, checkpoint: Checkpoint) -> None:
        self.committed.append(checkpoint)

    def round_started(self, number: int, asked: int) -> None: ...

    def client_done(self, outcome: ClientOutcome) -> None: ...

    def round_done(self, row: Round) -> None: ...

    @property
    def states(self) -> list[str]:
        return [arrays_digest(checkpoint.state) for checkpoint in self.committed]


def serving(resident: LoadedRun, notes: Notes) -> RoundServer:
    return RoundServer(resident, notes, notes, lambda state: None, lambda step: None, lambda roster: None)


def locally(run: RunConfig) -> Notes:
    resident, notes = load_simulated_run(run), Notes()
    set_loaded_run(resident)
    grid = LocalGrid(len(resident.data.clients), InlineWorkers())
    execute_rounds(serving(resident, notes), grid, None, grid)
    return notes


@contextmanager
def agents(
    address: str, rows: Path, sites: Sequence[str], model: Path | None = None
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """`fedpeft client` for each site, with its own file, and with its own copy of a model."""
    own = [] if model is None else ["--model", str(model)]
    command = [sys.executable, "-m", "fedpeft.cli", "client", "--server", address, "--insecure"]
    started = [
        subprocess.Popen(
            [
                *(*command, *own, "--data", str(rows / "train" / f"{site}.jsonl")),
                *("--home", str(rows / "homes" / site)),
            ],
            stderr=subprocess.DEVNULL,
        )
        for site in sites
    ]
    try:
        yield started
    finally:
        for agent in started:
            agent.terminate()
        assert [agent.wait(20) for agent in started] == [0] * len(started)


def over_grpc(run: RunConfig, rows: Path) -> Notes:
    notes, told = Notes(), device_task(run)
    with server(max_inline_bytes=8192) as running, agents(running.address, rows, SITES):
        grid = running.grid(RunIdentity("run-1", told.digest))

        def gather(task: Task) -> Roster:
            return roll_call(grid, task, expected=len(SITES), timeout_s=120.0)

        resident = load_serving_run(run)
        execute_rounds(serving(resident, notes), grid, None, gather=gather, device_task=told.text)
    return notes


@pytest.mark.slow
def test_agents_over_grpc_give_the_bytes_of_one_machine(rows: Path) -> None:
    here = locally(run_of(rows, rows / "train", stages=FEEDBACK))
    # What the server reads says nothing of the agents' files: it has none of them.
    there = over_grpc(run_of(rows, rows / "nowhere", stages=FEEDBACK), rows)
    assert here.states == there.states
    assert len(set(here.states)) == 4
    for mine, theirs in zip(here.committed[1:], there.committed[1:], strict=True):
        kept = [outcome.model_dump(exclude={"bytes_down"}) for outcome in mine.row.outcomes]
        came = [outcome.model_dump(exclude={"bytes_down"}) for outcome in theirs.row.outcomes]
        assert kept == came
    assert here.committed[-1].clients, "the stage remembers something, or this tests less"
    assert len(list(rows.glob("homes/*/memory/*.memory"))) == len(SITES)
    status = json.loads((rows / "homes" / SITES[0] / "status.json").read_text())
    assert status["state"] == "stopped"
    assert status["runs"][0]["rounds"] == 3
