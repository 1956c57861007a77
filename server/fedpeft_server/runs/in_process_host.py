"""A run's model in this very process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from fedpeft.config.sections import RunConfig
from fedpeft.errors import UsageError
from fedpeft.flower.server_app import RoundServer
from fedpeft.ledger import Checkpoint, RunFolder
from fedpeft.ledger.records import Evaluation
from fedpeft.ledger.run_place import ROWS
from fedpeft.participant.load_server import load_serving_run
from fedpeft.participant.load_simulation import load_simulated_run
from fedpeft.participant.loaded_run import LoadedRun, add_loaded_run, drop_loaded_run
from fedpeft.runtime.files import storage
from fedpeft.simulation.engine import Deployment, execute_run, write_adapter, write_summary
from fedpeft.updates.update import Arrays
from fedpeft.workers import Workers
from fedpeft_server.runs.journal_lines import LoggedProgress
from fedpeft_server.runs.model_host import Hold, RunStorage, write_checkpoints
from fedpeft_server.store import StoredRun

Evaluate = Callable[[Arrays], Evaluation | None]


class InProcessModelHost:
    """Loads the model when it is needed; see `ModelHost`.

    Args:
        at_work: entered while this process is at the model.
    """

    def __init__(self, stored: StoredRun, at_work: Callable[[], AbstractContextManager[None]]) -> None:
        self._stored, self._at_work = stored, at_work
        self._resident: LoadedRun | None = None
        self._start: Arrays = {}

    def hold(self, book: RunStorage, progress: LoggedProgress, hold: Hold) -> None:
        """All of it in the caller's thread."""
        with ExitStack() as finishing, book.open() as folder:

            def engine(server: RoundServer, last: Checkpoint | None, _pool: Workers) -> Checkpoint:
                reached = hold(replace(server, evaluate=self._wrap_evaluate(server.evaluate)), last)
                finishing.enter_context(self._at_work())
                return reached

            execute_run(folder, Deployment("grpc", engine, self._load), progress)

    def export(self, book: RunStorage) -> None:
        """See `ModelHost`."""
        last = book.rounds.latest()
        if self._resident is None or last is None:
            return
        with book.open() as folder:
            write_adapter(self._resident, folder, last)

    def snapshot(self, book: RunStorage, path: Path) -> None:
        """See `ModelHost`."""
        if self._resident is None:
            raise UsageError(f"run {book.id} has not come to its first commit; pull it a little later")
        write_snapshot(self._resident, book, path)

    def release(self) -> None:
        """See `ModelHost`."""
        self._resident = None
        drop_loaded_run(self._stored.digest)

    def _wrap_evaluate(self, evaluate: Evaluate) -> Evaluate:
        def noted(state: Arrays) -> Evaluation | None:
            with self._at_work():
                return evaluate(state)

        return noted

    def _load(self, run: RunConfig) -> LoadedRun:
        if self._resident is None:
            with self._at_work():
                self._resident = load_for_server(run)
                self._start = self._resident.initial_state()
        # An attempt before this one may have left the parameters elsewhere; baselines start here.
        self._resident.space.enter(self._resident.parameters, self._start)
        add_loaded_run(self._resident)
        return self._resident


def write_snapshot(resident: LoadedRun, book: RunStorage, path: Path) -> None:
    """Write what a run that goes on has reached to a new folder.

    Raises:
        UsageError: no round is committed.
        FedPEFTError: it cannot be written.
    """
    last = book.rounds.latest()
    if last is None:
        raise UsageError(f"run {book.id} has not come to its first commit; pull it a little later")
    with RunFolder.create(path, book.run, rounds=book.rounds) as folder:
        with storage(path):
            shutil.copyfile(book.path / ROWS, path / ROWS)
        folder.realign(last)
        write_adapter(resident, folder, last)
        write_checkpoints(folder, book.rounds)
        write_summary(folder)


def load_for_server(run: RunConfig) -> LoadedRun:
    """The run as a server needs it.

    The rows of the embedded data set are in every installation; of other runs only the test set is here.
    """
    torch.set_num_threads(1)
    load = load_simulated_run if run.data.train == "embedded" else load_serving_run
    return load(run)
