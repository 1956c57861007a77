"""`fedpeft plan`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fedpeft.commands.arguments import run_of
from fedpeft.errors import RunFileError, UsageError
from fedpeft.planning.fit import proposals_json, propose
from fedpeft.planning.loading import read_rows
from fedpeft.planning.plan import make_plan, make_refused_plan
from fedpeft.planning.predict import LIBRARIES
from fedpeft.planning.preflight import refuse_problems
from fedpeft.planning.show import show_plan
from fedpeft.planning.show_fit import show_fit

_UNITS = {"GB": 10**9, "MB": 10**6, "GiB": 2**30, "MiB": 2**20}


def plan_command(run_file: Path | None, overrides: Sequence[str], *, as_json: bool) -> None:
    """Print what a run would cost and what would be refused; end with 3 if anything would be.

    Raises:
        UsageError: an override that is not ``key=value``.
        SystemExit: with the exit code of `RunFileError`, when there are problems.
    """
    try:
        plan = make_plan(run_of(run_file, overrides))
    except RunFileError as error:
        plan = make_refused_plan(error)
    if as_json:
        print(json.dumps(plan.as_json()))
    else:
        show_plan(Console(file=sys.stdout, highlight=False), plan)
    if plan.problems:
        raise SystemExit(RunFileError.exit_code)


def fit_command(run_file: Path | None, overrides: Sequence[str], size: str, *, as_json: bool) -> None:
    """Print settings with which a run fits a device's memory; end with 3 if none do.

    Raises:
        UsageError: a size that is none.
        FedPEFTError: the run would be refused, whatever its size, or cannot be predicted.
        SystemExit: with the exit code of `RunFileError`, when nothing fits.
    """
    limit = bytes_of(size)
    run = run_of(run_file, overrides)
    refuse_problems(run, source=str(run_file or "demo"))
    found = propose(run, read_rows(run), limit, libraries=LIBRARIES)
    if as_json:
        head = {"run": run.run.name, "limit": limit, "libraries": LIBRARIES}
        print(json.dumps(head | {"proposals": proposals_json(found)}))
    else:
        show_fit(Console(file=sys.stdout, highlight=False), run.run.name, limit, found)
    if not found[-1].fits:
        raise SystemExit(RunFileError.exit_code)


def bytes_of(size: str) -> int:
    """A size such as "8GB", "7.5 GiB" or "900MB" in bytes.

    Raises:
        UsageError: it is none.
    """
    text = size.strip()
    unit = next((unit for unit in _UNITS if text.endswith(unit)), "")
    try:
        number = float(text.removesuffix(unit)) if unit else 0.0
    except ValueError:
        number = 0.0
    if not 0.0 < number < float("inf"):
        raise UsageError(f"--fit {size!r}: needs a size with a unit of {', '.join(_UNITS)}, such as 8GB")
    return int(number * _UNITS[unit])
