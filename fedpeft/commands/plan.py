"""`fedpeft plan`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fedpeft.commands.runs import run_of
from fedpeft.errors import RunFileError
from fedpeft.planning.plan import make_plan, refused_plan
from fedpeft.planning.show import show_plan


def plan_command(run_file: Path | None, overrides: Sequence[str], *, as_json: bool) -> None:
    """Print what a run would cost and what would be refused; end with 3 if anything would be.

    Raises:
        UsageError: an override that is not ``key=value``.
        SystemExit: with the exit code of `RunFileError`, when there are problems.
    """
    try:
        plan = make_plan(run_of(run_file, overrides))
    except RunFileError as error:
        plan = refused_plan(error)
    if as_json:
        print(json.dumps(plan.as_json()))
    else:
        show_plan(Console(file=sys.stdout, highlight=False), plan)
    if plan.problems:
        raise SystemExit(RunFileError.exit_code)
