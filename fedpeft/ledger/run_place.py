"""How the folder of a run is known, what in it is ours, and which run it says that it holds."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from fedpeft.config.run_file import flat_keys, load_run, run_from_json, run_from_toml, run_json, run_toml
from fedpeft.config.sections import RunConfig
from fedpeft.errors import RunExistsError, StateError
from fedpeft.ledger.kept_rows import KEPT_ROWS, KeptRows, read_kept_rows
from fedpeft.runtime.files import storage, write_atomically

RUN_FILE, ROWS, CHECKPOINTS, ADAPTER, REPORT, LOCK, PLUGGED = (
    "run.toml",
    "metrics.jsonl",
    "checkpoints",
    "adapter",
    "report.html",
    ".lock",
    "plugged-in",
)
IDENTITY = "run.json"  # marks a run, and says which (fedpeft.config.run_identity)
SPENT = "privacy.json"
_OURS = (
    ROWS,
    CHECKPOINTS,
    ADAPTER,
    REPORT,
    PLUGGED,
    KEPT_ROWS,
    "summary.json",
    "tensorboard",
    SPENT,
    RUN_FILE,
    IDENTITY,
)  # the mark last: as long as anything of a run is there, it is one


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


def run_folder_of(adapter: Path) -> Path | None:
    """Return the run folder whose own adapter a folder is; None for an adapter from elsewhere."""
    folder = adapter.resolve()
    return folder.parent if folder.name == ADAPTER and holds_run(folder.parent) else None


def run_with_rows(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the run of a run folder, its data section naming the places where its rows lie now.

    Where rows have moved, or with overrides, its digest is not the one of the folder's checkpoints.

    Raises:
        StateError, RunFileError: as `read_run`.
        UsageError: an override that is not ``key=value``.
    """
    run, kept = read_run(path), read_kept_rows(path)
    if overrides:
        run = load_run(path / RUN_FILE, overrides)
    named = [item.partition("=")[0].strip() for item in overrides]
    kept = KeptRows(
        train=None if "data.train" in named else kept.train, test=None if "data.test" in named else kept.test
    )
    return run if kept == KeptRows() else run.model_copy(update={"data": kept.section(run)})


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


def refuse_foreign_files(path: Path) -> None:
    """Refuse a folder with files of somebody else's under the names that a run writes.

    Raises:
        RunExistsError: there are such files.
    """
    foreign = [] if holds_run(path) else [name for name in _OURS if _is_there(path / name)]
    if foreign:
        raise RunExistsError(
            f"{path} is no run folder and holds {', '.join(foreign)}, which a run would replace; nothing was"
            " changed; choose another --out"
        )


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def refuse_edits(path: Path, run: RunConfig) -> None:
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


def clear_run(path: Path) -> None:
    """Delete what a run wrote into its folder, the mark of a run last.

    Raises:
        StorageError: it cannot be deleted.
    """
    with storage(path):
        for name in _OURS:
            target = path / name
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)
