"""One run on the daemon: the same path from folder to report as a simulation's, with agents for clients."""

from __future__ import annotations

import ctypes
import gc
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from flwr.serverapp import Grid

from fedpeft.config import RunConfig
from fedpeft.faults import crash_point
from fedpeft.files import storage, write_atomically
from fedpeft.flower.roster import Roster
from fedpeft.flower.server_app import Server, check_base, hold_rounds
from fedpeft.flower.tasks import Task
from fedpeft.groups import own_base_of
from fedpeft.ledger import Checkpoint, RunFolder
from fedpeft.ledger.folder_rounds import checkpoint_name
from fedpeft.ledger.run_folder import CHECKPOINTS
from fedpeft.resident import Resident, add_resident, drop_resident, load_resident, load_serving_resident
from fedpeft.simulation.engine import RunResult, Venue, begun_or_new, hold_run, write_adapter
from fedpeft.update import layout_of
from fedpeft.workers import Workers
from fedpeft_server.control import Control, WatchedGrid
from fedpeft_server.gathering import agents_wanted, gather
from fedpeft_server.journal_lines import LoggedProgress
from fedpeft_server.store import Status, Store, StoredRounds, StoredRun


class AgentGrid(Protocol):
    """A run's way to its agents."""

    @property
    def grid(self) -> Grid:
        """For the round loop."""
        ...

    def know(self, agents: Iterable[str]) -> None:
        """Make these addressable, connected or not."""
        ...

    def bound(self, result_bytes: int) -> None:
        """Refuse larger results than these before they are read."""
        ...

    def refused(self, agent: str, why: str) -> None:
        """Count an update that was not folded in, with its sender."""
        ...


OpenGrid = Callable[[StoredRun], AbstractContextManager[AgentGrid]]


@dataclass
class Host:
    """One thread's work on one run, over as many attempts as it takes.

    Attributes:
        control: keeps the run from going on when it shall not.
        patience_s: how long a round waits for its last answers where the run file sets no deadline: a member
            that never answers costs so much, and does not stop the run.
    """

    store: Store
    stored: StoredRun
    open_grid: OpenGrid
    control: Control
    patience_s: float = 21_600.0
    _resident: Resident | None = field(default=None, init=False)
    _kept: ExitStack = field(default_factory=ExitStack, init=False)
    _agents: AgentGrid | None = field(default=None, init=False)

    def attempt(self) -> RunResult:
        """Bring the run from its last committed round to its end.

        Raises:
            Halt: it was stopped, or something outside is in the way.
            FedPEFTError: see `fedpeft.errors`.
        """
        if self._agents is None:  # kept for the next attempt: agents go on with what they are at
            self._agents = self._kept.enter_context(self.open_grid(self.stored))
        rounds = self.store.rounds(self.stored, self.control.gate)
        path = self.store.run_folder(self.stored.id)
        with begun_or_new(path, self.stored.run, rounds=rounds) as folder:
            progress = LoggedProgress(
                self.stored.id,
                self._say,
                begun=rounds.latest() is not None,
                refused=self._agents.refused,
            )
            crash_point("server.run.begun")
            result = hold_run(folder, Venue("grpc", self._holder(self._agents), self._load), progress)
            crash_point("server.run.exported")
            _write_checkpoints(folder, rounds)
        digest = result.summary.finished.adapter_digest if result.summary.finished else ""
        self.store.runs.finish(self.stored.id, digest)
        return result

    def export(self) -> None:
        """Write the adapter of the last committed round, where the model is loaded and a round is committed.

        Raises:
            FedPEFTError: it cannot be written.
        """
        rounds = self.store.rounds(self.stored)
        last = rounds.latest()
        if self._resident is None or last is None:
            return
        with begun_or_new(self.store.run_folder(self.stored.id), self.stored.run, rounds=rounds) as folder:
            write_adapter(self._resident, folder, last.state)
            _write_checkpoints(folder, rounds)

    def release(self) -> None:
        """Let go of model and agents."""
        self._kept.close()
        self._agents = self._resident = None
        drop_resident(self.stored.digest)
        _give_back()

    def _say(self, text: str) -> None:
        self.store.runs.say(self.stored.id, text)

    def _load(self, run: RunConfig) -> Resident:
        """The run as a server needs it, kept for the next attempt.

        The rows of the embedded data set are in every installation; of other runs only the test set is here.
        """
        if self._resident is None:
            torch.set_num_threads(1)
            load = load_resident if run.data.train == "embedded" else load_serving_resident
            self._resident = load(run)
        add_resident(self._resident)
        return self._resident

    def _holder(self, agents: AgentGrid) -> Callable[[Server, Checkpoint | None, Workers], Checkpoint]:
        grid = WatchedGrid(agents.grid, self.control)
        run = self.stored.run
        stated = run.federation.deadline_s if run.federation.clock is None else None
        deadline_s = self.patience_s if stated is None else stated

        def hold(server: Server, last: Checkpoint | None, _pool: Workers) -> Checkpoint:
            agents.bound(largest_update(server.resident))

            def call(task: Task) -> Roster:
                roster = self._roster(server, grid, task)
                agents.know(roster.names)
                self.store.runs.set_status(self.stored.id, Status.RUNNING)
                return roster

            return hold_rounds(server, grid, last, timeout_s=deadline_s, gather=call)

        return hold

    def _roster(self, server: Server, grid: Grid, task: Task) -> Roster:
        """Who takes part: asked once in a run's life, since a round's cohort is drawn from it."""
        kept = self.store.runs.roster(self.stored.id)
        if kept is not None:
            return kept
        roster = gather(
            grid,
            task,
            wanted=agents_wanted(self.stored.run, self.stored.rules),
            wait_s=self.stored.rules.wait_s,
            control=self.control,
            check=lambda came: check_base(came, server.resident),
            own_base=own_base_of(self.stored.run),
            waiting=lambda why: self.store.runs.set_status(self.stored.id, Status.WAITING, why),
        )
        return self.store.runs.keep_roster(self.stored.id, roster)


def largest_update(resident: Resident) -> int:
    """Bytes that no sound update of the run exceeds.

    Twice those of the plain arrays, as a sparse code spends up to as much on positions as on values; and a
    MiB for names, metrics and what surrounds it all.
    """
    layout = resident.space.update_layout(layout_of(resident.space.initial_state(resident.parameters)))
    plain = sum(math.prod(shape) * np.dtype(kind).itemsize for shape, kind in layout.values())
    return 2 * plain + (1 << 20)


def _give_back() -> None:
    """Return freed memory to the system (glibc; elsewhere nothing happens).

    A run leaves it in pieces; a server that holds run after run would keep a fifth more than it uses.
    """
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _write_checkpoints(folder: RunFolder, rounds: StoredRounds) -> None:
    """The start and the end as files: what compressing, replaying and merging ask of a run's folder."""
    for number, content in rounds.contents().items():
        place = folder.path / CHECKPOINTS / checkpoint_name(number)
        with storage(place):
            known = place.exists() and place.read_bytes() == content
        if not known:
            write_atomically(place, content)
        crash_point("server.run.checkpoint-copied")
