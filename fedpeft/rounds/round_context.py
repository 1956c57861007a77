"""What a run's rounds work with: the federation, and those who are told of its rounds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedpeft.aggregation.lora_rules import Shares
from fedpeft.config.run_identity import identity_digest
from fedpeft.config.sections import RunConfig
from fedpeft.ledger import Checkpoint, Cohort
from fedpeft.ledger.records import ClientOutcome, Evaluation, Round
from fedpeft.rounds.private_rounds import BudgetStore
from fedpeft.spaces import ServerSpace
from fedpeft.stages import Stage, stage_list
from fedpeft.transport.roster import Roster
from fedpeft.updates.update import Arrays


class Journal(Protocol):
    """Where rounds become durable."""

    def open_round(self, number: int, draw: Callable[[], Cohort]) -> Cohort:
        """The cohort of a round that begins, before anyone is asked; the same again after a restart in it.

        Args:
            draw: draws it; a journal that has it from before doesn't call this.
        """
        ...

    def commit(self, checkpoint: Checkpoint) -> None:
        """Make the round durable before this returns."""
        ...


class History(Protocol):
    """What a journal knows of the past; asked when buffered rounds go on after a restart."""

    def checkpoint(self, number: int) -> Checkpoint:
        """A committed round.

        Raises:
            StateError: it is not there any more.
        """
        ...

    def list_uncommitted(self) -> Sequence[tuple[str, int]]:
        """Durable updates that no committed round counts: (client, round of its task), as they came."""
        ...


class Observer(Protocol):
    """Who is told how the rounds go."""

    def round_started(self, number: int, asked: int) -> None:
        """A round begins with so many asked clients."""
        ...

    def client_done(self, outcome: ClientOutcome) -> None:
        """One asked client is done, whatever became of it."""
        ...

    def round_done(self, row: Round) -> None:
        """The round is committed."""
        ...


class ClientMemory(Protocol):
    """What simulated clients remember between rounds; real agents keep theirs themselves."""

    def memory(self) -> dict[str, NDArray[Any]]:
        """All of it, by ``"<node>/<array>"``."""
        ...

    def restore_memory(self, memory: Mapping[str, NDArray[Any]]) -> None:
        """Put it back after a restart."""
        ...


@dataclass(frozen=True)
class RoundContext:
    """Everything that a run's rounds need.

    Attributes:
        evaluate: the global state's evaluation, called as often as the run file says.
        digest: of the run file; checkpoints belong to it.
        run_json: sent along with tasks where processes of an engine load the run by themselves; else empty.
        device_task: what agents are told of the run, sent along with tasks; empty where clients are none.
        timeout_s: how long a round waits for answers, in real seconds; None where time is virtual.
        memory: the grid's client memory, where it keeps one.
        downlink: the stage that compresses the state's way down; None: the whole state travels.
        budget: where a private run's ledger lies; other runs need none.
        history: what buffered rounds ask after a restart; other runs need none.
        frozen_factors: LoRA's A where it doesn't train, by its parameter's name.
        newcomers: asked before each round, by its number: the roster with those who have come since, durable;
            None: who takes part is settled by the roll call.
    """

    run: RunConfig
    digest: str
    grid: Grid
    roster: Roster
    space: ServerSpace
    stages: tuple[Stage, ...]
    journal: Journal
    observer: Observer
    evaluate: Callable[[Arrays], Evaluation | None]
    run_json: str = ""
    device_task: str = ""
    timeout_s: float | None = None
    memory: ClientMemory | None = None
    downlink: Stage | None = None
    budget: BudgetStore | None = None
    history: History | None = None
    frozen_factors: Arrays = field(default_factory=dict)
    newcomers: Callable[[int], Roster] | None = None

    @functools.cached_property
    def task_digest(self) -> str:
        """The run's name in tasks, states and updates: its digest, or that of what agents are told of it."""
        return identity_digest(self.device_task) if self.device_task else self.digest

    @functools.cached_property
    def shares(self) -> Shares:
        """What each client holds, trains and sends."""
        return Shares(self.run)

    @functools.cached_property
    def stage_list(self) -> tuple[tuple[str, str], ...]:
        """The stages as every update must name them; written out once, not once per reply."""
        return stage_list(self.stages)
