"""`fedpeft audit`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedpeft.commands.arguments import run_of
from fedpeft.config.sections import RecordLevelPrivacy, RunConfig
from fedpeft.data.row_records import RowRecord, read_parts
from fedpeft.data.run_tables import source_records
from fedpeft.data.sources import find_files
from fedpeft.errors import DataError, PrivacyError, UsageError
from fedpeft.planning.preflight import refuse_problems
from fedpeft.reporting.text import printable
from fedpeft.runtime.randomness import stream
from fedpeft.simulation.sensitivity import Measurement, draw_records, measure_sensitivity


def sensitivity_command(
    run_file: Path | None,
    overrides: Sequence[str],
    *,
    data: Path | None,
    rows: int,
    neighbours: int,
    seed: int,
    as_json: bool,
) -> None:
    """Print how far single records or persons move a step's sum; end with 10 if one moves it too far.

    Args:
        data: a file or folder of records; None: those that the run file names.
        rows: records that are drawn of them.
        neighbours: units that are left out, one after the other.
        seed: of both.

    Raises:
        UsageError: the run's privacy is not at record level.
        FedPEFTError: a run file, rows or a model that cannot be used.
        SystemExit: with the exit code of `PrivacyError`, when a bound is exceeded.
    """
    run = run_of(run_file, overrides)
    refuse_problems(run, source=str(run_file or "demo"))
    if not isinstance(run.privacy, RecordLevelPrivacy):
        came = "none" if run.privacy is None else f"kind '{run.privacy.kind}'"
        raise UsageError(
            f"the run's [privacy] is {came}, and sensitivity is measured of kind 'record-level': of other"
            " kinds each update is clipped as a whole, whatever came before"
        )
    torch.set_num_threads(1)  # as in simulations
    records = _records(run, data, rows, seed)
    found = list(measure_sensitivity(run, records, neighbours=neighbours, seed=seed))
    _refuse_unmoved(run, found)
    report_sensitivity(run, len(records), found, as_json=as_json)


def report_sensitivity(run: RunConfig, records: int, found: Sequence[Measurement], *, as_json: bool) -> None:
    """Print measurements of so many records.

    Raises:
        SystemExit: with the exit code of `PrivacyError`, when a bound is exceeded.
    """
    exceeded = sum(each.exceeds for each in found)
    if as_json:
        head = {"run": run.run.name, "unit": _unit(run), "records": records, "exceeded": exceeded}
        print(json.dumps(head | {"measurements": [asdict(each) for each in found]}))
    else:
        _show(Console(file=sys.stdout, highlight=False), run, records, found)
    if exceeded:
        raise SystemExit(PrivacyError.exit_code)


def _records(run: RunConfig, data: Path | None, rows: int, seed: int) -> list[RowRecord]:
    """Draw records of the run's or of another file.

    Raises:
        DataError: there are none.
    """
    source = source_records(run.data, run.run.seed) if data is None else read_parts(find_files(str(data)))
    drawn = draw_records(source, rows, stream(seed, "records"))
    if not drawn:
        raise DataError("there are no records to leave out; name a file with rows")
    return [replace(record, part=0) for record in drawn]


def _refuse_unmoved(run: RunConfig, found: Sequence[Measurement]) -> None:
    """Refuse to say that bounds hold where nothing was measured.

    Raises:
        DataError: no unit that was left out moved anything.
    """
    if not any(each.measured for each in found):
        raise DataError(
            f"none of the {len(found)} {_unit(run)}s that were left out moved the sum at all, which says"
            " nothing of its bound: rows that are held out (data.heldout) or cannot be used are not trained"
            " on; give more --neighbours, or other --data"
        )


def _unit(run: RunConfig) -> str:
    return "record" if run.data.user is None else "person"


def _show(console: Console, run: RunConfig, records: int, found: Sequence[Measurement]) -> None:
    """A line per neighbour, and the largest of all."""
    unit = _unit(run)
    title = Text(
        f"{printable(run.run.name)} · {records} records, one {unit} left out at a time", style="bold"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("left out", overflow="fold")
    for heading in ("records", "after round", "measured", "bound"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for each in found:
        verdict = Text("EXCEEDED", style="bold red") if each.exceeds else Text("within")
        place = Text(printable(each.left_out))
        table.add_row(
            place, str(each.records), str(each.round), f"{each.measured:.6f}", f"{each.bound:.6f}", verdict
        )
    console.print(table)
    largest = max(each.measured for each in found)
    over = sum(each.exceeds for each in found)
    end = f"no {unit} moves the sum further than its noise is made for"
    if over:
        end = (
            f"{over} of {len(found)} move it further than its noise is made for: epsilon is more than claimed"
        )
    console.print(Text(f"largest  {largest:.6f} times max_grad_norm; {end}"), soft_wrap=True)
