"""The folder of one simulated run: run file, rows, checkpoints, adapter, report.

The checkpoint of a round is its transaction. `metrics.jsonl` is rebuilt from the checkpoints when a run is
resumed, so a crash between the two is no loss.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from pydantic import ValidationError

from fedpeft.config import RunConfig
from fedpeft.errors import RunExistsError, StateError
from fedpeft.files import append_line, remove_partial, storage, write_atomically
from fedpeft.ledger.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from fedpeft.records import Baseline, Finished, Row, Started, parse_row
from fedpeft.runfile import load_run, run_digest, run_toml

RUN_FILE, ROWS, CHECKPOINTS, ADAPTER, REPORT, LOCK = (
    "run.toml",
    "metrics.jsonl",
    "checkpoints",
    "adapter",
    "report.html",
    ".lock",
)
_OURS = (
    ROWS,
    CHECKPOINTS,
    ADAPTER,
    REPORT,
    "summary.json",
    "tensorboard",
    RUN_FILE,
)  # the run file last: it marks a run


class RunFolder:
    """An open run folder. One process at a time holds it; use it as a context manager."""

    def __init__(self, path: Path, run: RunConfig, lock: int) -> None:
        self.path = path
        self.run = run
        self.digest = run_digest(run)
        self._lock = lock

    @classmethod
    def create(cls, path: Path, run: RunConfig, *, force: bool = False) -> RunFolder:
        """Start a new run in `path`.

        Args:
            force: delete a run that is there already, finished or not.

        Raises:
            RunExistsError: there is a run and `force` is off.
            StateError: another process holds the folder.
            StorageError: the folder can't be made or written.
        """
        with storage(path):
            path.mkdir(parents=True, exist_ok=True)
        lock = _locked(path)
        try:
            if (path / RUN_FILE).exists():
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
            write_atomically(path / RUN_FILE, run_toml(run).encode())
        except BaseException:
            os.close(lock)
            raise
        return cls(path, run, lock)

    @classmethod
    def resume(cls, path: Path) -> RunFolder:
        """Open a run that was begun.

        Raises:
            StateError: no run is there, or another process holds it.
            RunFileError: its run file was changed into something unusable.
        """
        if not (path / RUN_FILE).is_file():
            raise StateError(
                f"{path} holds no run (no {RUN_FILE}); start one with: fedpeft simulate RUN.toml --out {path}"
            )
        lock = _locked(path)
        try:
            run = load_run(path / RUN_FILE)
            remove_partial(path)
            with storage(path):
                (path / CHECKPOINTS).mkdir(exist_ok=True)
            remove_partial(path / CHECKPOINTS)
        except BaseException:
            os.close(lock)
            raise
        return cls(path, run, lock)

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

    def commit(self, checkpoint: Checkpoint) -> None:
        """Make a round durable: its checkpoint, then its row; old checkpoints go as the run file says."""
        write_checkpoint(self._checkpoint_path(checkpoint.round), checkpoint)
        self.append(checkpoint.row)
        keep = self.run.output.keep_checkpoints
        if keep is not None:
            for path in self._checkpoint_paths()[:-keep]:
                path.unlink()

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint; None before the first.

        Raises:
            StateError: it is corrupt or of another run.
        """
        paths = self._checkpoint_paths()
        return read_checkpoint(paths[-1], self.digest) if paths else None

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

    def _checkpoint_path(self, round_: int) -> Path:
        return self.path / CHECKPOINTS / f"round-{round_:06d}.safetensors"

    def _checkpoint_paths(self) -> list[Path]:
        return sorted((self.path / CHECKPOINTS).glob("round-*.safetensors"))


def _belongs(row: Row, last: int, rounds: int) -> bool:
    """Whether the newest checkpoint backs a row; baselines follow the last round, the end is written anew."""
    if row.event == "round":
        return row.round <= last
    if row.event == "baseline":
        return last >= rounds
    return row.event == "started" and last >= 0


def _locked(path: Path) -> int:
    with storage(path):
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise StateError(
            f"{path} is in use by another fedpeft process; wait for it or choose another --out"
        ) from error
    return lock


def _clear(path: Path) -> None:
    with storage(path):
        for name in _OURS:
            target = path / name
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)
