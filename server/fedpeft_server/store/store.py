"""Everything that outlives the daemon: one folder, one database, one owner at a time."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from fedpeft.files import hold_lock, storage
from fedpeft_server.metrics import Metrics
from fedpeft_server.store.agents import Agents
from fedpeft_server.store.blobs import Blobs
from fedpeft_server.store.database import BUSY_S, Database
from fedpeft_server.store.results import Results
from fedpeft_server.store.rounds import StoredRounds, used_blobs
from fedpeft_server.store.runs import Runs, StoredRun

DATABASE, BLOBS, RUNS, LOCK = "state.db", "blobs", "runs", ".lock"
SCRATCH = ".scratch-"
_ABANDONED_S = 24 * 3600.0  # an upload that nobody has gone on with for so long


@dataclass(frozen=True)
class Reference:
    """What another process needs to read a run's rounds and to write its log.

    Attributes:
        url: of the database, with its password.
    """

    url: str
    blobs: Path


class Store:
    """The state of a daemon, held until it is closed; use it as a context manager.

    Args:
        folder: made if missing, readable by its owner only.
        url: of the database; None: an SQLite file in the folder.
        migrate: bring a database of an older version up to date.
        busy_s: how long a statement waits for another process's lock before the run pauses.
        metrics: counts what is stored; None: for nobody.

    Raises:
        StateError: another server holds the folder, or the database is of another version.
        StorageError: it cannot be made or written.
        UsageError: the URL cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        *,
        url: str | None = None,
        migrate: bool = False,
        busy_s: float = BUSY_S,
        metrics: Metrics | None = None,
    ) -> None:
        with storage(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            (folder / RUNS).mkdir(exist_ok=True)
        self.folder = folder
        self.metrics = metrics or Metrics()
        self._lock = hold_lock(
            folder / LOCK,
            in_use=f"{folder} is in use by another fedpeft server; end it, or give another --state",
        )
        try:
            url = url or f"sqlite:///{folder.resolve() / DATABASE}"
            self.database = Database(
                url, migrate=migrate, busy_s=busy_s, observe=self.metrics.commits.observe
            )
            self.database.own()
            self.blobs = Blobs(folder / BLOBS)
            self.reference = Reference(url, self.blobs.folder)
        except BaseException:
            os.close(self._lock)
            raise
        self.clear()
        self.agents = Agents(self.database)
        self.runs = Runs(self.database)
        self.results = Results(self.database, self.blobs, self.metrics)
        self.metrics.watch_ledger(self.runs)

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.database.close()
        os.close(self._lock)

    def rounds(self, stored: StoredRun, gate: Callable[[], None] = lambda: None) -> StoredRounds:
        """The journal of a run; `gate` may keep it from going on."""
        return StoredRounds(
            self.database,
            self.blobs,
            stored.id,
            stored.digest,
            keep=stored.run.output.keep_checkpoints,
            deadline_s=stored.run.federation.deadline_s,
            gate=gate,
            closed=self.metrics.closed,
        )

    def run_folder(self, run_id: str) -> Path:
        """Where a run's adapter and report are written."""
        return self.folder / RUNS / run_id

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder that is gone afterwards; what a kill leaves of it goes when the store is opened."""
        with storage(self.folder):
            path = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=self.folder))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def clear(self) -> None:
        """Remove what a killed server left behind. No other one holds the folder."""
        for path in self.folder.glob(f"{SCRATCH}*"):
            shutil.rmtree(path, ignore_errors=True)

    def collect(self) -> int:
        """Delete blobs that nothing refers to; uploads under way stay for a day. Returns how many went."""
        with self.database.reading() as connection:
            used = used_blobs(connection)
        return self.blobs.collect(used, older_than_s=_ABANDONED_S)
