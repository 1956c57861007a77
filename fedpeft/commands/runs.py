"""Run files and adapters as commands take them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from fedpeft.config import RunConfig
from fedpeft.errors import UsageError
from fedpeft.ledger.run_folder import ADAPTER, RUN_FILE, holds_run, read_run
from fedpeft.runfile import load_run


def demo_file() -> Path:
    """The run file of the embedded demo."""
    return Path(str(files("fedpeft.presets") / "demo.toml"))


def run_of(run_file: Path | None, overrides: Sequence[str]) -> RunConfig:
    """The run that a command means; without a file, the demo."""
    return load_run(run_file or demo_file(), overrides)


def adapter_folder(path: Path) -> Path:
    """The adapter folder that `path` is, or that the run folder `path` holds.

    Raises:
        UsageError: neither.
    """
    folder = path / ADAPTER if (path / ADAPTER).is_dir() else path
    if not folder.is_dir():
        raise UsageError(f"{path} is no adapter folder and holds none; give the folder that a run wrote")
    return folder


def adapter_and_run(adapter: Path, run_file: Path | None, overrides: Sequence[str]) -> tuple[Path, RunConfig]:
    """An adapter folder and the run it belongs to: the run whose folder it lies in, unless another is given.

    Raises:
        UsageError: no adapter there, or no run file to go with it.
    """
    folder = adapter_folder(adapter)
    beside = folder.parent
    if run_file is None and not holds_run(beside):
        raise UsageError(
            f"{folder} does not lie in the folder of a run; say which model and data with --run RUN.toml"
        )
    if run_file is None and not overrides:
        return folder, read_run(beside)
    return folder, load_run(run_file or beside / RUN_FILE, overrides)
