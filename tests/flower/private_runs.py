"""Holding private rounds in memory, with a ledger whose disk can be made to fail."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.config.run_file import build_run, run_digest, run_json
from fedpeft.config.sections import RunConfig
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
from fedpeft.workers import InlineWorkers

SIZE = 4
CLIENTS = 20
CLIENT_LEVEL: Mapping[str, Any] = {
    "kind": "client-level",
    "clip_norm": 0.5,
    "noise_multiplier": 1.0,
    "target_delta": 1e-5,
    "max_epsilon": 1000.0,
}
POISSON: Mapping[str, Any] = {"weighting": "uniform", "sampling": {"kind": "poisson", "rate": 0.25}}


class KilledError(Exception):
    """Stands for a process that is gone."""


@dataclass
class Disk:
    """What survives a killed process: commits, the ledger; and what an operator was shown.

    Attributes:
        dies_at: "spend N" before the ledger of round N is written, "release N" before its checkpoint is.
    """

    checkpoints: list[Checkpoint] = field(default_factory=list)
    ledgers: list[str] = field(default_factory=list)
    shown: list[ClientOutcome] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    dies_at: str = ""
    resumes: bool = False

    def open_round(self, number: int, draw: Callable[[], Cohort]) -> Cohort:
        return draw()

    def commit(self, checkpoint: Checkpoint) -> None:
        if self.dies_at == f"release {checkpoint.round}":
            raise KilledError
        self.checkpoints.append(checkpoint)

    def read_spent_ledger(self) -> str | None:
        return self.ledgers[-1] if self.ledgers else None

    def commit_spent(self, ledger: str) -> None:
        if self.dies_at == f"spend {len(self.ledgers) + 1}":
            raise KilledError
        self.ledgers.append(ledger)

    def round_started(self, number: int, asked: int) -> None:
        self.asked.append(asked)

    def client_done(self, outcome: ClientOutcome) -> None:
        self.shown.append(outcome)

    def round_done(self, row: Round) -> None: ...

    @property
    def epsilons(self) -> list[float | None]:
        return [checkpoint.row.epsilon for checkpoint in self.checkpoints]

    @property
    def changes(self) -> list[NDArray[np.float64]]:
        """By how much each round moved the state, float64[size]."""
        states = [checkpoint.state["a"].astype(np.float64) for checkpoint in self.checkpoints]
        return [after - before for before, after in itertools.pairwise(states)]


def private_run(privacy: Mapping[str, Any], *, rounds: int = 3, **federation: Any) -> RunConfig:
    tables = {
        "run": {"name": "private", "rounds": rounds},
        "training": {"steps": 2},
        "federation": {**POISSON, **federation},
        "privacy": dict(privacy),
    }
    return build_run(tables, source="test")


def hold(
    run: RunConfig, app: str, disk: Disk | None = None, *, clients: int = CLIENTS, size: int = SIZE
) -> Disk:
    """Hold the run, or go on with it from what is on the disk."""
    disk = disk or Disk()
    digest, text = run_digest(run), run_json(run)
    grid = LocalGrid(clients, InlineWorkers(), f"tests.flower.private_apps:{app}")
    federation = RoundContext(
        run=run,
        digest=digest,
        grid=grid,
        roster=roll_call(grid, Task(digest, 0, b"", text), expected=clients),
        space=AdapterDelta(),
        stages=build_stages(run),
        journal=disk,
        observer=disk,
        evaluate=lambda state: None,
        run_json=text,
        memory=grid,
        budget=disk,
    )
    if not disk.checkpoints:
        initial_checkpoint(federation, freeze_arrays({"a": np.zeros(size, dtype=np.float32)}))
    run_rounds(federation, disk.checkpoints[-1])
    return disk
