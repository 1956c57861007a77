"""The folder of one run: run file, rows, checkpoints, adapter, report.

A round's commit is its transaction: a checkpoint in the folder, or what else the folder was opened with.
`metrics.jsonl` is rebuilt from the commits when a run is resumed, so a crash between the two is no loss.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from pydantic import ValidationError

from fedpeft.config.run_file import run_digest, run_toml
from fedpeft.config.sections import DataSection, RunConfig
from fedpeft.errors import RunExistsError, StateError
from fedpeft.ledger.checkpoint import Checkpoint
from fedpeft.ledger.cohort import Cohort
from fedpeft.ledger.folder_rounds import FolderRounds, Rounds
from fedpeft.ledger.kept_rows import KeptRows, read_kept_rows
from fedpeft.ledger.records import Baseline, Finished, Row, Started, parse_row
from fedpeft.ledger.run_place import (
    ADAPTER,
    CHECKPOINTS,
    IDENTITY,
    LOCK,
    REPORT,
    ROWS,
    RUN_FILE,
    SPENT,
    clear_run,
    holds_run,
    read_run,
    refuse_edits,
    refuse_foreign_files,
    write_run,
)
from fedpeft.runtime.files import append_line, hold_lock, remove_partial, storage, write_atomically


class RunFolder:
    """An open run folder. One process at a time holds it; use it as a context manager."""

    def __init__(
        self, path: Path, run: RunConfig, lock: int, rounds: Rounds | None, kept: KeptRows | None = None
    ) -> None:
        self.path = path
        self.run = run
        self.digest = run_digest(run)
        self._lock = lock
        self._kept = kept or KeptRows()
        self._rows_digest = ""
        self._rounds: Rounds = rounds or FolderRounds(
            path / CHECKPOINTS, path / SPENT, self.digest, run.output.keep_checkpoints
        )

    @classmethod
    def create(
        cls, path: Path, run: RunConfig, *, force: bool = False, rounds: Rounds | None = None
    ) -> RunFolder:
        """Start a new run in `path`.

        Args:
            force: delete a run that is there already, finished or not; only what runs write is deleted.
            rounds: where rounds are committed; None: to files in the folder.

        Raises:
            RunExistsError: there is a run and `force` is off, or files that no run wrote are in the way.
            StateError: another process holds the folder.
            StorageError: the folder can't be made or written.
        """
        with storage(path):
            path.mkdir(parents=True, exist_ok=True)
        refuse_foreign_files(path)
        lock = _lock(path)
        try:
            if holds_run(path):
                if not force:
                    raise RunExistsError(
                        f"{path} already holds a run; continue it with --resume {path}, replace it with"
                        " --force,"
                        " or choose another --out"
                    )
                clear_run(path)
            remove_partial(path)
            with storage(path):
                (path / CHECKPOINTS).mkdir(exist_ok=True)
            write_run(path, run)
        except BaseException:
            os.close(lock)
            raise
        return cls(path, run, lock, rounds)

    @classmethod
    def resume(
        cls,
        path: Path,
        *,
        rounds: Rounds | None = None,
        train: str | None = None,
        test: str | None = None,
    ) -> RunFolder:
        """Open a run that was begun.

        Args:
            rounds: see `create`.
            train, test: where the rows of `data.train` and `data.test` lie now; None: where they lay before.
                The run stays the same run.

        Raises:
            StateError: no run is there, another process holds it, or its run file was changed since it began.
            RunFileError: its run file was changed into something unusable.
        """
        if not holds_run(path):
            raise StateError(
                f"{path} holds no run (no {IDENTITY}); start one with: fedpeft simulate RUN.toml --out {path}"
            )
        lock = _lock(path)
        try:
            run = read_run(path)
            if not (path / RUN_FILE).exists():  # the kill came before it was written
                write_atomically(path / RUN_FILE, run_toml(run).encode())
            refuse_edits(path, run)
            kept = read_kept_rows(path).relocate(train, test)
            remove_partial(path)
            with storage(path):
                (path / CHECKPOINTS).mkdir(exist_ok=True)
            remove_partial(path / CHECKPOINTS)
        except BaseException:
            os.close(lock)
            raise
        return cls(path, run, lock, rounds, kept)

    @property
    def data(self) -> DataSection:
        """The run's data section, naming the places where its rows lie now."""
        return self._kept.section(self.run)

    def bind_rows(self, digest: str) -> None:
        """Hold the run to the rows that it began with, before anything is trained on them.

        Each checkpoint gets the digest too, but for private runs: it confirms a guess of all rows.

        Raises:
            StateError: the run began with other rows.
        """
        last = self._rounds.latest()
        known = self._kept.digest or ("" if last is None else last.rows_digest)
        if known and known != digest:
            raise StateError(
                f"{self.path}: the rows have changed: the run began with others (digest {known[:12]}) than"
                f" are there now ({digest[:12]}); put them back, say with --data PATH where they are now, or"
                " start anew with another --out"
            )
        self._kept = replace(self._kept, digest=digest)
        if read_kept_rows(self.path) != self._kept:
            self._kept.write(self.path)
        self._rows_digest = "" if self.run.privacy is not None else digest

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    @property
    def adapter(self) -> Path:
        """The folder of the finished adapter."""
        return self.path / ADAPTER

    def rows(self) -> list[Row]:
        """All whole rows of `metrics.jsonl`; a torn last line is left out.

        Raises:
            StateError: a row in the middle that cannot be read.
        """
        path = self.path / ROWS
        if not path.exists():
            return []
        with storage(path):
            lines = path.read_bytes().split(b"\n")
        rows: list[Row] = []
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            try:
                rows.append(parse_row(line))
            except ValidationError as error:
                if number == len(lines):  # no newline after it: the write was cut short
                    break
                raise StateError(
                    f"{path}: line {number} is no row of this version; restore the file or start anew"
                ) from error
        return rows

    def append(self, row: Row) -> None:
        """Add a row durably."""
        append_line(self.path / ROWS, row.model_dump_json())

    def open_round(self, number: int, draw: Callable[[], Cohort]) -> Cohort:
        """The cohort of a round that begins; see `Rounds`."""
        return self._rounds.open_round(number, draw)

    def commit(self, checkpoint: Checkpoint) -> None:
        """Make a round durable, then write its row."""
        self._rounds.commit(replace(checkpoint, rows_digest=self._rows_digest))
        self.append(checkpoint.row)

    @property
    def resumes(self) -> bool:
        """Whether a round that was cut short is gone on with; see `Rounds`."""
        return self._rounds.resumes

    def checkpoint(self, number: int) -> Checkpoint:
        """A committed round that is still kept; see `Rounds`."""
        return self._rounds.checkpoint(number)

    def list_uncommitted(self) -> Sequence[tuple[str, int]]:
        """Durable updates that no committed round counts; see `Rounds`."""
        return self._rounds.list_uncommitted()

    def read_spent_ledger(self) -> str | None:
        """The ledger of spent privacy; None before the first charge."""
        return self._rounds.read_spent_ledger()

    def commit_spent(self, ledger: str) -> None:
        """Make the ledger durable; before this returns nothing of the round may be released."""
        self._rounds.commit_spent(ledger)

    def latest(self) -> Checkpoint | None:
        """The newest committed round; None before the first.

        Raises:
            StateError: it is corrupt or of another run.
        """
        return self._rounds.latest()

    def realign(self, checkpoint: Checkpoint | None) -> None:
        """Make `metrics.jsonl` say what the checkpoints say: every committed round and no other."""
        rows = self.rows()
        last = -1 if checkpoint is None else checkpoint.round
        kept = [row for row in rows if _belongs(row, last, self.run.run.rounds)]
        known = {row.round for row in kept if row.event == "round"}
        if checkpoint is not None and checkpoint.round not in known:
            position = sum(1 for row in kept if row.event in ("started", "round"))
            kept.insert(position, checkpoint.row)
        self._write_rows(kept)

    def read_end(self) -> Finished | None:
        """The last row, if the run came to its end and everything it promises is there."""
        rows = self.rows()
        last = rows[-1] if rows else None
        whole = (self.path / ADAPTER).is_dir() and (self.path / REPORT).is_file()
        return last if isinstance(last, Finished) and whole else None

    def read_start(self) -> Started | None:
        """The first row, if it was written."""
        rows = self.rows()
        return rows[0] if rows and isinstance(rows[0], Started) else None

    def baselines(self) -> list[Baseline]:
        """The baselines that are done."""
        return [row for row in self.rows() if isinstance(row, Baseline)]

    def _write_rows(self, rows: Sequence[Row]) -> None:
        text = "".join(row.model_dump_json() + "\n" for row in rows)
        write_atomically(self.path / ROWS, text.encode())


def open_or_create(path: Path, run: RunConfig, *, rounds: Rounds | None = None) -> RunFolder:
    """The open folder of this very run, begun or not.

    Raises:
        RunExistsError: another run is there.
    """
    if not holds_run(path):
        return RunFolder.create(path, run, rounds=rounds)
    folder = RunFolder.resume(path, rounds=rounds)
    if folder.digest != run_digest(run):
        with folder:
            raise RunExistsError(
                f"{path} holds run {folder.digest[:12]}, the run file is {run_digest(run)[:12]}; choose"
                " another folder, or undo the run file's changes"
            )
    return folder


def _belongs(row: Row, last: int, rounds: int) -> bool:
    """Whether the newest checkpoint backs a row; baselines follow the last round, the end is written anew."""
    if row.event == "round":
        return row.round <= last
    if row.event == "baseline":
        return last >= rounds
    return row.event == "started" and last >= 0


def _lock(path: Path) -> int:
    in_use = f"{path} is in use by another fedpeft process; wait for it or choose another --out"
    return hold_lock(path / LOCK, in_use=in_use, mode=0o644)
