"""The runs of a daemon: queued, held one or more at a time, paused and tried again, stopped, drained.

What holds a run's model stands on torch and half a gigabyte of memory with it; see `model_room`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedpeft.attacks import refuse_attack
from fedpeft.config.device_task import device_task
from fedpeft.config.sections import RunConfig
from fedpeft.credentials import Role
from fedpeft.errors import DataError, FedPEFTError, QuorumError, StorageError, UsageError
from fedpeft.privacy.noise_sources import refuse_seeded
from fedpeft_server.runs.agent_wait import agents_wanted
from fedpeft_server.runs.control import (
    PATIENCE,
    Control,
    Draining,
    Halt,
    Losses,
    Patience,
    Paused,
    ProcessLostError,
    SteadyClock,
    Stopped,
)
from fedpeft_server.runs.risks import Risks
from fedpeft_server.runs.roots import Roots
from fedpeft_server.runs.run_statuses import RunStatuses, one_line
from fedpeft_server.store import Quota, Rules, RunStatus, Store, StoredRun

if TYPE_CHECKING:
    from fedpeft_server.runs.hosting import Host, OpenGrid
    from fedpeft_server.runs.model_process_pool import ModelProcessPool

LOG = logging.getLogger("fedpeft.server")
FIRST_RETRY_S, LONGEST_RETRY_S = 0.5, 30.0
SNAPSHOT_S = 60.0  # for the run's thread to come to a point at which it waits
STOP_S = 10.0  # for a stopped run to write what it has reached; it goes on with that if it takes longer
MOST_LOSSES = 2  # of processes that held a run's model, this one too, without a round in between


@dataclass
class _Active:
    control: Control
    digest: str
    thread: threading.Thread
    host: Host | None = None


class Supervisor:
    """Holds runs on threads of their own. Its methods may be called on any thread.

    Args:
        open_grid: a run's way to its agents.
        parallel: runs that are held at a time; two of the same run file never are.
        patience: of rounds of runs whose file sets no deadline.
        models: processes that hold models; None: this one does.
        quota: what each submitter may hold; None: there is no bound.
        roots: which of this machine's files submitters may name; None: there is no bound.
    """

    def __init__(
        self,
        store: Store,
        open_grid: OpenGrid,
        *,
        parallel: int = 1,
        patience: Patience = PATIENCE,
        clock: SteadyClock | None = None,
        models: ModelProcessPool | None = None,
        quota: Quota | None = None,
        roots: Roots | None = None,
    ) -> None:
        self._roots = roots
        self._store, self._open_grid, self._parallel = store, open_grid, parallel
        self._patience, self._models, self._quota = patience, models, quota
        self._clock = clock or SteadyClock()
        self._lock = threading.RLock()
        self._active: dict[str, _Active] = {}
        self._draining = False
        self._statuses = RunStatuses(store, lambda: self._draining)
        self._idle = threading.Condition(self._lock)
        self._risks = Risks(store.folder)

    def start(self) -> None:
        """Go on with what was under way when the server ended, then with what is queued.

        Raises:
            StorageError: the store cannot be used.
        """
        unended = self._store.runs.list_unended()
        self._risks.take_stock([stored.id for stored in unended])
        for stored in unended:
            losses = self._risks.losses(stored.id)
            if stored.status == RunStatus.STOPPING:
                self._store.runs.set_status(stored.id, RunStatus.STOPPED, stored.reason)
            elif losses >= MOST_LOSSES:
                aside = f"set aside, as the server was lost {losses} times while it was at this run's model"
                self._store.runs.set_status(stored.id, RunStatus.FAILED, aside)
            elif stored.problem:
                self._set_aside(stored)
            else:
                self._store.runs.set_status(stored.id, RunStatus.QUEUED, "the server was started")
        self._fill()

    def submit(
        self,
        run: RunConfig,
        rules: Rules,
        *,
        submission: str,
        submitter: str,
        role: str = "submitter",
        readers: Sequence[str] = (),
    ) -> StoredRun:
        """Queue a run, at a cost that doesn't depend on how many there are; a submission counts once.

        Args:
            submission, submitter, role, readers: see `Runs.submit`.

        Raises:
            RunFileError: everything that is wrong with it.
            PrivacyError: its noise is no secret.
            UsageError: it is not said for how many agents it waits, or the server is ending.
            LimitError: the submitter has its share of the server.
            StorageError: it cannot be stored.
        """
        runs, quota = self._store.runs, self._quota
        known = runs.find_submission(run, submission=submission, submitter=submitter)
        if known is not None:
            return self._statuses.as_it_stands(known)
        if quota is not None:  # before the checks, which take long; what counts is asked in the transaction
            runs.check_quota(submitter, run, quota)
        if self._roots is not None and role != Role.ADMIN:
            self._roots.refuse(run)
        device_task(run)
        self._check(run)
        refuse_seeded(run)
        refuse_attack(run)
        agents_wanted(run, rules)
        if self._draining:
            raise UsageError("the server is ending; submit the run again when it is back")
        stored = runs.submit(
            run, rules, submission=submission, submitter=submitter, role=role, readers=readers, quota=quota
        )
        self._fill()
        return stored

    def _check(self, run: RunConfig) -> None:
        if self._models is not None:
            self._models.check(run)
            return
        from fedpeft.planning.preflight import refuse_problems  # with a first run, as it brings torch

        refuse_problems(run, source="run file")

    def get(self, run_id: str) -> StoredRun:
        """One run as it stands, even where its standing cannot be written.

        Raises:
            UsageError: there is none of that id.
            StorageError: the store cannot be read.
        """
        return self._statuses.as_it_stands(self._store.runs.get(run_id))

    def list(self, *, reader: str | None = None, limit: int = 0) -> list[StoredRun]:
        """Runs as they stand, the newest first; see `Runs.list`. Raises as `get`."""
        return [
            self._statuses.as_it_stands(stored)
            for stored in self._store.runs.list(reader=reader, limit=limit)
        ]

    def stop(self, run_id: str, reason: str) -> StoredRun:
        """End a run for good; what is committed stays. A run that has ended is left as it is.

        It is durable before anything acts on it: whatever the run's thread is at, and if the server dies
        meanwhile, the run does not go on. What a process is at for the run is not waited for.

        Raises:
            UsageError: there is no such run.
            StorageError: it cannot be written down; the run goes on.
        """
        self._store.runs.get(run_id)
        self._store.runs.set_status(run_id, RunStatus.STOPPING, reason)
        with self._lock:
            active = self._active.get(run_id)
        if active is None:
            self._store.runs.set_status(run_id, RunStatus.STOPPED, reason)
        else:
            active.control.halt(Stopped(reason))
            active.thread.join(timeout=STOP_S)
        return self._store.runs.get(run_id)

    def snapshot(self, run_id: str, folder: Path) -> int:
        """Write what a run that goes on has reached to a new folder; the round of it.

        Raises:
            UsageError: it isn't held now, is in the middle of something long, or has reached nothing.
            FedPEFTError: it cannot be written.
        """
        with self._lock:
            active = self._active.get(run_id)
            host = None if active is None else active.host
        if active is None or host is None:
            raise UsageError(f"run {run_id} waits for its turn; pull it when it goes on, or has ended")
        reached: list[int] = []
        done = active.control.errand(lambda: reached.append(host.snapshot(folder)))
        try:
            done.result(SNAPSHOT_S)
        except TimeoutError:
            done.cancel()
            raise UsageError(
                f"run {run_id} is in the middle of something, such as an evaluation; pull it a little later"
            ) from None
        except Halt as why:
            raise UsageError(f"run {run_id} cannot be copied now ({one_line(why)}); pull it again") from why
        return reached[0]

    def trouble(self, line: str | None) -> None:
        """What keeps updates from being stored, for people to see; None: nothing any more."""
        with self._lock:
            names = list(self._active)
        self._statuses.trouble(names, line)

    def drain(self, timeout_s: float) -> bool:
        """Let every run reach a point from which it goes on later; whether all have in time.

        A commit that has begun is finished. It is safe to leave without it.
        """
        with self._lock:
            self._draining = True
            for active in self._active.values():
                active.control.halt(Draining("the server is ending"))
            return self._idle.wait_for(lambda: not self._active, timeout_s)

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no run is held; whether that came to be."""
        with self._lock:
            return self._idle.wait_for(lambda: not self._active, timeout_s)

    def _fill(self) -> None:
        """Start the oldest queued runs while there is room."""
        with self._lock:
            while not self._draining and len(self._active) < self._parallel:
                held = {active.digest for active in self._active.values()}  # one model per run file
                stored = self._store.runs.next_queued(without=list(self._active), digests=held)
                if stored is None:
                    return
                if stored.problem:
                    self._set_aside(stored)
                else:
                    self._start(stored)

    def _set_aside(self, stored: StoredRun) -> None:
        """Pause a run that this version cannot read: until it is stopped, or a version comes that can."""
        LOG.error("run %s: set aside: %s", stored.id, stored.problem)
        self._store.runs.set_status(stored.id, RunStatus.PAUSED, f"set aside: {stored.problem}")

    def _start(self, stored: StoredRun) -> None:
        control = Control(self._clock)
        thread = threading.Thread(
            target=self._hold, args=(stored, control), name=f"fedpeft-{stored.id}", daemon=True
        )
        self._active[stored.id] = _Active(control, stored.digest, thread)
        thread.start()

    def _hold(self, stored: StoredRun, control: Control) -> None:
        """On the run's thread: attempts until the run has ended or the server does."""
        from fedpeft_server.runs.hosting import Host  # with a first run, as it brings numba

        host = Host(
            self._store,
            stored,
            self._open_grid,
            control,
            self._patience,
            self._models,
            self._quota,
            self._risks,
        )
        with self._lock:
            self._active[stored.id].host = host
        losses = Losses()
        try:
            retry_s = FIRST_RETRY_S
            while self._attempt(host, losses):
                try:
                    host.control.sleep(retry_s)
                except Stopped as why:
                    self._end(host, str(why))
                    break
                except Draining:
                    break
                retry_s = min(2 * retry_s, LONGEST_RETRY_S)
        finally:
            control.leave()
            host.release()
            self._statuses.clear(host.stored.id)
            self._leave(host.stored.id)

    def _attempt(self, host: Host, losses: Losses) -> bool:
        """One attempt; whether another one is due."""
        run_id = host.stored.id
        try:
            host.attempt()
        except Stopped as why:
            self._end(host, str(why))
        except Draining:
            LOG.info("run %s: put aside, it goes on when the server is back", run_id)
        except ProcessLostError as why:
            if losses.count(self._last_committed_round(run_id)) < MOST_LOSSES or self._draining:
                self._statuses.pause(run_id, why)
                return True
            aside = f"set aside, as its model's process was lost {MOST_LOSSES} times at one point"
            self._statuses.settle(host.stored.id, RunStatus.FAILED, f"{aside}: {one_line(why)}")
        except (Paused, StorageError, QuorumError) as why:
            self._statuses.pause(run_id, why)
            return True
        except FedPEFTError as error:
            self._statuses.settle(host.stored.id, RunStatus.FAILED, _public_reason(run_id, error))
        except Exception as error:
            LOG.exception("run %s failed", run_id)
            self._statuses.settle(
                host.stored.id, RunStatus.FAILED, f"internal error: {type(error).__name__}: {one_line(error)}"
            )
        return False

    def _last_committed_round(self, run_id: str) -> int:
        """The round that was committed last; -1 where there is none, or the store cannot say."""
        try:
            return self._store.runs.get(run_id).round
        except StorageError:
            return -1

    def _end(self, host: Host, reason: str) -> None:
        """A person stopped the run: what it has reached is worth an adapter."""
        host.control.take_halt()
        try:
            host.export()
        except (FedPEFTError, Halt) as error:
            LOG.warning("run %s: its adapter cannot be written: %s", host.stored.id, one_line(error))
        self._statuses.settle(host.stored.id, RunStatus.STOPPED, reason)

    def _leave(self, run_id: str) -> None:
        """A place is free: tidy up, and take the next run before anyone sees the place empty."""
        try:
            self._store.measure(run_id)
            self._store.collect()
        except FedPEFTError as error:
            LOG.warning("nothing was tidied up: %s", error)
        with self._lock:
            self._active.pop(run_id, None)
            try:
                self._fill()
                unfilled = False
            except StorageError:
                unfilled = True
            self._idle.notify_all()
        if unfilled:
            self._statuses.patiently(self._fill)


def _public_reason(run_id: str, error: FedPEFTError) -> str:
    """What a run's submitter and readers are told of its failure: of the server's rows, nothing."""
    if isinstance(error, DataError):
        LOG.error("run %s: %s", run_id, one_line(error))
        return "DataError: rows cannot be used, here or at a client; the reason is in the server's own log"
    return f"{type(error).__name__}: {one_line(error)}"
