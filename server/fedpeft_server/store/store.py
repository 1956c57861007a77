"""Everything that outlives the daemon: one folder, one database, one owner at a time."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from fedpeft.errors import StateError
from fedpeft.runtime.files import hold_lock, make_private_folder, storage
from fedpeft_server.server_metrics import ServerMetrics
from fedpeft_server.store.agents import Agents
from fedpeft_server.store.audit_log import HEAD, AuditLog
from fedpeft_server.store.blobs import BlobFolder
from fedpeft_server.store.database import BUSY_S, Database
from fedpeft_server.store.results import Results
from fedpeft_server.store.rounds import StoredRounds, list_used_blobs
from fedpeft_server.store.runs import Runs
from fedpeft_server.store.stored_run import StoredRun

DATABASE, BLOBS, RUNS, LOCK = "state.db", "blobs", "runs", ".lock"
SCRATCH = ".scratch-"
_ABANDONED_S = 24 * 3600.0  # an upload that nobody has gone on with for so long


def _holds_something(path: Path) -> bool:
    """Whether a file is there, or a folder with anything in it."""
    with storage(path):
        return path.is_file() or (path.is_dir() and any(path.iterdir()))


@dataclass(frozen=True)
class Reference:
    """What another process needs to read a run's rounds and to write its log.

    Attributes:
        url: of the database, with its password.
        epoch: of the server that it writes for, see `Database.own`.
    """

    url: str
    blobs: Path
    epoch: int | None = None


class Store:
    """The state of a daemon, held until it is closed; use it as a context manager.

    Args:
        folder: made if missing, readable by its owner only; one that others can read is refused.
        url: of the database; None: an SQLite file in the folder.
        migrate: bring a database of an older version up to date.
        busy_s: how long a statement waits for another process's lock before the run pauses.
        metrics: counts what is stored; None: for nobody.

    Raises:
        StateError: another server holds the folder, others can read it, the database is of another version,
            or what the folder and the database hold does not belong together.
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
        metrics: ServerMetrics | None = None,
    ) -> None:
        make_private_folder(folder, holds="updates, models and runs")
        self.folder = folder
        self.reference: Reference
        self.metrics = metrics or ServerMetrics()
        self._lock = hold_lock(
            folder / LOCK,
            in_use=f"{folder} is in use by another fedpeft server; end it, or give another --state",
        )
        with ExitStack() as undone:
            undone.callback(os.close, self._lock)
            self.database = self._open_database(url, migrate=migrate, busy_s=busy_s)
            undone.callback(self.database.close)
            self.database.own()
            self.reference = replace(self.reference, epoch=self.database.epoch)
            self._check_contents()
            self.blobs = BlobFolder(folder / BLOBS)
            with storage(folder):
                (folder / RUNS).mkdir(exist_ok=True)
            self.audit = AuditLog(self.database, folder)
            self.audit.begin()
            undone.pop_all()
        self.clear()
        self.agents = Agents(self.database)
        self.runs = Runs(self.database, self.audit)
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
            closed=self.metrics.count_committed_round,
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

    def measure(self, run_id: str) -> None:
        """Count what a run that has ended keeps on the disk for its submitter."""
        with storage(self.run_folder(run_id)):
            files = [file for file in self.run_folder(run_id).rglob("*") if file.is_file()]
            self.runs.measure(run_id, sum(file.stat().st_size for file in files))

    def remove_files(self, run_id: str) -> None:
        """Delete the folder, checkpoints and waiting updates of a run that has ended."""
        folder = self.run_folder(run_id)
        with storage(folder):
            if folder.exists():
                shutil.rmtree(folder)
        unused = self.runs.forget_contents(run_id)
        with self.database.reading() as connection:
            still = list_used_blobs(connection)
        self.blobs.remove(sorted(set(unused) - still))

    def _open_database(self, url: str | None, *, migrate: bool, busy_s: float) -> Database:
        """Open the database, which is made only for a folder that holds nothing yet."""
        own = self.folder / DATABASE
        begun = [name for name in (RUNS, BLOBS, HEAD) if _holds_something(self.folder / name)]
        url_or_own = url or f"sqlite:///{own.resolve()}"
        self.reference = Reference(url_or_own, self.folder / BLOBS)
        if begun and url is None and not own.is_file():
            raise StateError(
                f"{own} is missing, and {' and '.join(begun)} beside it say that this state has begun; put it"
                " back, or restore a backup to another folder. Nothing was changed"
            )
        return Database(
            url_or_own,
            create=not begun,
            migrate=migrate,
            busy_s=busy_s,
            observe=self.metrics.commits.observe,
        )

    def _check_contents(self) -> None:
        """Refuse a database whose contents lie in another folder than this one."""
        if (self.folder / BLOBS).is_dir():
            return
        with self.database.reading() as connection:
            missing = len(list_used_blobs(connection))
        if missing:
            raise StateError(
                f"{self.folder / BLOBS} is missing, and the database names {missing} contents in it; give"
                " --state and --database that belong together, or restore a backup"
            )

    def clear(self) -> None:
        """Remove what a killed server left behind. No other one holds the folder."""
        for path in self.folder.glob(f"{SCRATCH}*"):
            shutil.rmtree(path, ignore_errors=True)

    def collect(self) -> int:
        """Delete blobs that nothing refers to; uploads under way stay for a day. Returns how many went."""
        with self.database.reading() as connection:
            used = list_used_blobs(connection)
        return self.blobs.collect(used, older_than_s=_ABANDONED_S)
