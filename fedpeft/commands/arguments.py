"""Run files and adapters as commands take them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from fedpeft.config.run_file import load_run
from fedpeft.config.sections import RunConfig
from fedpeft.errors import UsageError
from fedpeft.ledger.run_place import ADAPTER, run_folder_of, run_with_rows


def demo_file() -> Path:
    """The run file of the embedded demo."""
    return Path(str(files("fedpeft.config.presets") / "demo.toml"))


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
    if run_file is not None:
        return folder, load_run(run_file, overrides)
    run_folder = run_folder_of(folder)
    if run_folder is None:
        raise UsageError(
            f"{folder} is not the adapter of a run's folder; say which model and data with --run RUN.toml"
        )
    return folder, run_with_rows(run_folder, overrides)
