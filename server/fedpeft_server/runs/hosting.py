"""One run on the daemon: the same path from folder to report as a simulation's, with agents for clients."""

from __future__ import annotations

import ctypes
import gc
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from flwr.serverapp import Grid

from fedpeft.config.client_groups import own_base_of
from fedpeft.config.device_task import device_task
from fedpeft.config.run_file import run_json
from fedpeft.config.run_plugins import plugins_of, plugins_text
from fedpeft.errors import StateError, StorageError, UsageError
from fedpeft.flower.server_app import RoundServer, RunView, check_base, execute_rounds
from fedpeft.ledger import Checkpoint
from fedpeft.ledger.run_place import ROWS
from fedpeft.privacy.kinds import is_cohort_secret
from fedpeft.runtime.crash_points import crash_point
from fedpeft.transport.roster import Roster
from fedpeft.transport.tasks import Task
from fedpeft.updates.update import layout_of
from fedpeft_server.runs.agent_wait import agents_wanted, wait_for_agents
from fedpeft_server.runs.control import PATIENCE, Control, Patience, Stopped, WatchedGrid
from fedpeft_server.runs.joining import Joining, Strangers
from fedpeft_server.runs.journal_lines import LoggedProgress, event_line
from fedpeft_server.runs.members import incomplete, waits_for
from fedpeft_server.runs.model_host import (
    HeldElsewhereError,
    Hold,
    ModelHost,
    RunStorage,
    counts_alone,
    write_checkpoints,
)
from fedpeft_server.runs.model_process_pool import ModelProcessPool
from fedpeft_server.runs.risks import Risks
from fedpeft_server.store import Quota, RunStatus, Store, StoredRounds, StoredRun

LOG = logging.getLogger("fedpeft.server")


class AgentGrid(Strangers, Protocol):
    """A run's way to its agents."""

    @property
    def grid(self) -> Grid:
        """For the round loop."""
        ...

    def set_result_limit(self, result_bytes: int) -> None:
        """Refuse larger results than these before they are read."""
        ...

    def count_refusal(self, agent: str, why: str) -> None:
        """Count an update that was not folded in, with its sender."""
        ...


OpenGrid = Callable[[StoredRun], AbstractContextManager[AgentGrid]]


@dataclass
class Host:
    """One thread's work on one run, over as many attempts as it takes.

    Attributes:
        control: keeps the run from going on when it shall not.
        patience: how long a round waits for its last answers where the run file sets no deadline.
        models: processes that hold models; None: this process does.
        risks: notes of what the daemon itself is at work for.
        quota: of the run's submitter; a run whose submitter's runs keep too much is stopped.
    """

    store: Store
    stored: StoredRun
    open_grid: OpenGrid
    control: Control
    patience: Patience = PATIENCE
    models: ModelProcessPool | None = None
    quota: Quota | None = None
    risks: Risks | None = None
    _keeper: ModelHost | None = field(default=None, init=False)
    _kept: ExitStack = field(default_factory=ExitStack, init=False)
    _agents: AgentGrid | None = field(default=None, init=False)

    def attempt(self) -> None:
        """Bring the run from its last committed round to its end.

        Raises:
            Halt: it was stopped, or something outside is in the way.
            FedPEFTError: see `fedpeft.errors`.
        """
        if self._agents is None:  # kept for the next attempt: agents go on with what they are at
            self._agents = self._kept.enter_context(self.open_grid(self.stored))
        rounds = self.store.rounds(self.stored, self._gate)
        book = self._book(rounds)
        progress = LoggedProgress(
            self.stored.id,
            self._say,
            begun=rounds.latest() is not None,
            refused=self._agents.count_refusal,
            secret_cohort=is_cohort_secret(self.stored.run),
        )
        crash_point("server.run.begun")
        self._execute_rounds(book, progress, self._holder(self._agents))
        crash_point("server.run.exported")
        with book.open() as folder:
            write_checkpoints(folder, rounds)
            end = folder.read_end()
        if not self.stored.run.federation.over_selection:  # by which somebody's answer never counts
            for member in incomplete(rounds.rows()):
                self._say(event_line("trouble", str(member)))
        self.store.runs.finish(self.stored.id, end.adapter_digest if end is not None else "")

    def export(self) -> None:
        """Write the adapter of the last committed round, where the model is loaded and a round is committed.

        Raises:
            FedPEFTError: it cannot be written.
        """
        rounds = self.store.rounds(self.stored)
        if self._keeper is None or rounds.latest() is None:
            return
        book = self._book(rounds)
        self._keeper.export(book)
        with book.open() as folder:
            write_checkpoints(folder, rounds)

    def snapshot(self, path: Path) -> int:
        """Write what a run that goes on has reached to a new folder; the round of it. On the run's thread.

        Raises:
            UsageError: no round is committed.
            FedPEFTError: it cannot be written.
        """
        rounds = self.store.rounds(self.stored)
        last = rounds.latest()
        lines = self.store.run_folder(self.stored.id) / ROWS
        if self._keeper is None or last is None or not lines.exists():
            raise UsageError(f"run {self.stored.id} has not come to its first commit; pull it a little later")
        self._keeper.snapshot(self._book(rounds), path)
        return last.round

    def release(self) -> None:
        """Let go of model and agents."""
        self._kept.close()
        if self._keeper is not None:
            self._keeper.release()
        self._agents = self._keeper = None
        _give_back()

    def _gate(self) -> None:
        """What must hold before a round is opened or closed.

        Raises:
            Halt: it doesn't.
        """
        self.control.gate()
        if self.quota is not None:
            line = self.store.runs.over_quota(self.stored.submitter, self.quota)
            if line is not None:
                raise Stopped(line)

    def _book(self, rounds: StoredRounds) -> RunStorage:
        path = self.store.run_folder(self.stored.id)
        return RunStorage(self.stored.id, self.stored.run, self.store.reference, path, rounds)

    def _say(self, text: str) -> None:
        self.store.runs.say(self.stored.id, text)

    def _waits_for(self, away: Mapping[str, float]) -> None:
        """Say for whom alone the round waits; in the daemon's log alone where it is secret who takes part."""
        why = waits_for(away, time.time())
        if why:
            LOG.info("run %s: %s", self.stored.id, why, extra={"event": "waits", "run": self.stored.id})
        if is_cohort_secret(self.stored.run):
            return
        with suppress(StorageError):  # a word for people is no reason to leave the round
            self.store.runs.set_status(self.stored.id, RunStatus.RUNNING, why)

    def _execute_rounds(self, book: RunStorage, progress: LoggedProgress, hold: Hold) -> None:
        """Bring the run to its end where its model is; kept for the next attempt."""
        if self._keeper is None:
            apart = self.models is not None and counts_alone(self.stored.run)
            if self.models is not None and not apart:
                self._try_load(self.models)
            self._keeper = self._apart() if apart else self._here()
        try:
            self._keeper.hold(book, progress, hold)
        except HeldElsewhereError:
            self._keeper.release()
            self._keeper = self._here()
            self._keeper.hold(book, progress, hold)

    def _at_work(self) -> AbstractContextManager[None]:
        """While this process is at the run's model."""
        if self.risks is None:
            return nullcontext()
        return self.risks.at_work(self.stored.id, self.store.runs.get(self.stored.id).round)

    def _try_load(self, models: ModelProcessPool) -> None:
        """Load the model where it may take a process down, or stand still, before this process loads it."""
        process = models.take()
        try:
            with self.control.kill_on_stop(process.kill):
                process.ask("load", {"run": run_json(self.stored.run)})
        finally:
            models.end(process)

    def _here(self) -> ModelHost:
        from fedpeft_server.runs.in_process_host import InProcessModelHost  # as it brings torch

        return InProcessModelHost(self.stored, self._at_work)

    def _apart(self) -> ModelHost:
        from fedpeft_server.runs.subprocess_host import SubprocessModelHost

        if self.models is None:
            raise StateError("this server has no processes for models")
        return SubprocessModelHost(self.stored, self.models, self.control)

    def _holder(self, agents: AgentGrid) -> Hold:
        run = self.stored.run
        stated = run.federation.deadline_s if run.federation.clock is None else None
        deadline_s = self.patience.round_s if stated is None else stated
        away_s = self.patience.away_s if stated is None else math.inf
        grid = WatchedGrid(agents.grid, self.control, away_s=away_s, waits_for=self._waits_for)

        task_text = device_task(run).text

        def hold(server: RoundServer, last: Checkpoint | None) -> Checkpoint:
            agents.set_result_limit(largest_update(server.resident))

            joining = Joining(
                run,
                agents,
                check=lambda came: check_base(came, server.resident),
                keep=lambda larger: self.store.runs.keep_roster(self.stored.id, larger),
                say=lambda line: self._say(event_line("note", line)),
                is_open=lambda number: self.store.rounds(self.stored).is_open(number),
            )

            def call(task: Task) -> Roster:
                roster = self._roster(server, grid, task)
                agents.know(roster.names)
                joining.begin(task, roster)
                self.store.runs.set_status(self.stored.id, RunStatus.RUNNING)
                return roster

            return execute_rounds(
                server,
                grid,
                last,
                timeout_s=deadline_s,
                gather=call,
                newcomers=joining.before,
                device_task=task_text,
            )

        return hold

    def _roster(self, server: RoundServer, grid: Grid, task: Task) -> Roster:
        """Who takes part, by the roll call, which is held once in a run's life; `Joining` adds to it."""
        kept = self.store.runs.roster(self.stored.id)
        if kept is not None:
            return kept
        roster = wait_for_agents(
            grid,
            task,
            wanted=agents_wanted(self.stored.run, self.stored.rules),
            named=self.stored.rules.agents,
            wait_s=self.stored.rules.wait_s,
            control=self.control,
            check=lambda came: check_base(came, server.resident),
            own_base=own_base_of(self.stored.run),
            plugins=plugins_text(plugins_of(self.stored.run)),
            waiting=lambda why: self.store.runs.set_status(self.stored.id, RunStatus.WAITING, why),
        )
        return self.store.runs.keep_roster(self.stored.id, roster)


def largest_update(held: RunView) -> int:
    """Bytes that no sound update of the run exceeds.

    Twice those of the plain arrays, as a sparse code spends up to as much on positions as on values; and a
    MiB for names, metrics and what surrounds it all.
    """
    layout = held.space.update_layout(layout_of(held.initial_state()))
    plain = sum(math.prod(shape) * np.dtype(kind).itemsize for shape, kind in layout.values())
    return 2 * plain + (1 << 20)


def _give_back() -> None:
    """Return freed memory to the system (glibc; elsewhere nothing happens).

    A run leaves it in pieces; a server that holds run after run would keep a fifth more than it uses.
    """
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
