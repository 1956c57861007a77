"""The folder of one run: run file, rows, checkpoints, adapter, report.

A round's commit is its transaction: a checkpoint in the folder, or what else the folder was opened with.
`metrics.jsonl` is rebuilt from the commits when a run is resumed, so a crash between the two is no loss.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from pydantic import ValidationError

from fedpeft.config import RunConfig
from fedpeft.errors import RunExistsError, StateError
from fedpeft.files import append_line, hold_lock, remove_partial, storage, write_atomically
from fedpeft.ledger.checkpoint import Checkpoint
from fedpeft.ledger.cohort import Cohort
from fedpeft.ledger.folder_rounds import FolderRounds, Rounds
from fedpeft.records import Baseline, Finished, Row, Started, parse_row
from fedpeft.runfile import flat_keys, run_digest, run_from_json, run_from_toml, run_json, run_toml

RUN_FILE, ROWS, CHECKPOINTS, ADAPTER, REPORT, LOCK = (
    "run.toml",
    "metrics.jsonl",
    "checkpoints",
    "adapter",
    "report.html",
    ".lock",
)
IDENTITY = "run.json"  # marks a run, and says which (fedpeft.run_identity)
SPENT = "privacy.json"
_OURS = (
    ROWS,
    CHECKPOINTS,
    ADAPTER,
    REPORT,
    "summary.json",
    "tensorboard",
    SPENT,
    RUN_FILE,
    IDENTITY,
)  # the mark last: as long as anything of a run is there, it is one


class RunFolder:
    """An open run folder. One process at a time holds it; use it as a context manager."""

    def __init__(self, path: Path, run: RunConfig, lock: int, rounds: Rounds | None) -> None:
        self.path = path
        self.run = run
        self.digest = run_digest(run)
        self._lock = lock
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
        _refuse_foreign_files(path)
        lock = _locked(path)
        try:
            if holds_run(path):
                if not force:
                    raise RunExistsError(
                        f"{path} already holds a run; continue it with --resume {path}, replace it with"
                        " --force,"
                        " or choose another --out"
                    )
                _clear(path)
            remove_partial(path)
            with storage(path):
                (path / CHECKPOINTS).mkdir(exist_ok=True)
            write_run(path, run)
        except BaseException:
            os.close(lock)
            raise
        return cls(path, run, lock, rounds)

    @classmethod
    def resume(cls, path: Path, *, rounds: Rounds | None = None) -> RunFolder:
        """Open a run that was begun.

        Raises:
            StateError: no run is there, another process holds it, or its run file was changed since it began.
            RunFileError: its run file was changed into something unusable.
        """
        if not holds_run(path):
            raise StateError(
                f"{path} holds no run (no {IDENTITY}); start one with: fedpeft simulate RUN.toml --out {path}"
            )
        lock = _locked(path)
        try:
            run = read_run(path)
            if not (path / RUN_FILE).exists():  # the kill came before it was written
                write_atomically(path / RUN_FILE, run_toml(run).encode())
            _refuse_edits(path, run)
            remove_partial(path)
            with storage(path):
                (path / CHECKPOINTS).mkdir(exist_ok=True)
            remove_partial(path / CHECKPOINTS)
        except BaseException:
            os.close(lock)
            raise
        return cls(path, run, lock, rounds)

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
        self._rounds.commit(checkpoint)
        self.append(checkpoint.row)

    @property
    def resumes(self) -> bool:
        """Whether a round that was cut short is gone on with; see `Rounds`."""
        return self._rounds.resumes

    def checkpoint(self, number: int) -> Checkpoint:
        """A committed round that is still kept; see `Rounds`."""
        return self._rounds.checkpoint(number)

    def arrived(self) -> Sequence[tuple[str, int]]:
        """Durable updates that no committed round counts; see `Rounds`."""
        return self._rounds.arrived()

    def spent(self) -> str | None:
        """The ledger of spent privacy; None before the first charge."""
        return self._rounds.spent()

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

    def finished(self) -> Finished | None:
        """The last row, if the run came to its end and everything it promises is there."""
        rows = self.rows()
        last = rows[-1] if rows else None
        whole = (self.path / ADAPTER).is_dir() and (self.path / REPORT).is_file()
        return last if isinstance(last, Finished) and whole else None

    def started(self) -> Started | None:
        """The first row, if it was written."""
        rows = self.rows()
        return rows[0] if rows and isinstance(rows[0], Started) else None

    def baselines(self) -> list[Baseline]:
        """The baselines that are done."""
        return [row for row in self.rows() if isinstance(row, Baseline)]

    def _write_rows(self, rows: Sequence[Row]) -> None:
        text = "".join(row.model_dump_json() + "\n" for row in rows)
        write_atomically(self.path / ROWS, text.encode())


def holds_run(path: Path) -> bool:
    """Return whether a folder is a run's: a run file alone may be anybody's."""
    return (path / IDENTITY).is_file()


def write_run(path: Path, run: RunConfig) -> None:
    """Mark a folder as a run's: write which run it is, and its run file with every default written out.

    Raises:
        StorageError: it cannot be written.
    """
    write_atomically(path / IDENTITY, run_json(run).encode())
    write_atomically(path / RUN_FILE, run_toml(run).encode())


def read_run(path: Path) -> RunConfig:
    """Read the run of a run folder, as it was when it began.

    Raises:
        StateError: the folder is no run's.
        RunFileError: what it holds cannot be read by this version.
    """
    if not holds_run(path):
        raise StateError(f"{path} holds no run (no {IDENTITY}); give a folder that a run wrote")
    with storage(path):
        return run_from_json((path / IDENTITY).read_text(encoding="utf-8"))


def _refuse_foreign_files(path: Path) -> None:
    """Refuse a folder with files of somebody else's under the names that a run writes.

    Raises:
        RunExistsError: there are such files.
    """
    foreign = [] if holds_run(path) else [name for name in _OURS if (path / name).exists()]
    if foreign:
        raise RunExistsError(
            f"{path} is no run folder and holds {', '.join(foreign)}, which a run would replace; nothing was"
            " changed; choose another --out"
        )


def _refuse_edits(path: Path, run: RunConfig) -> None:
    """Refuse a run file that says something else than the run that began.

    Raises:
        StateError: with the keys in which they differ.
        RunFileError: it cannot be used at all.
    """
    with storage(path):
        text = (path / RUN_FILE).read_bytes()
    now = run_from_toml(text, source=str(path / RUN_FILE))
    if now == run:
        return
    was, came = flat_keys(run.model_dump(mode="json")), flat_keys(now.model_dump(mode="json"))
    keys = [key for key in sorted(was.keys() | came.keys()) if was.get(key) != came.get(key)]
    raise StateError(
        f"{path / RUN_FILE} was changed since the run began ({', '.join(keys[:5])}); undo that, or start a"
        " new run with another --out"
    )


def begun_or_new(path: Path, run: RunConfig, *, rounds: Rounds | None = None) -> RunFolder:
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


def _locked(path: Path) -> int:
    in_use = f"{path} is in use by another fedpeft process; wait for it or choose another --out"
    return hold_lock(path / LOCK, in_use=in_use, mode=0o644)


def _clear(path: Path) -> None:
    with storage(path):
        for name in _OURS:
            target = path / name
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)
