"""`fedpeft evaluate`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedpeft.commands.adapters import resident_with_adapter
from fedpeft.commands.arguments import adapter_and_run
from fedpeft.config.sections import RunConfig
from fedpeft.errors import DataError
from fedpeft.evaluation.metrics import METRICS
from fedpeft.ledger.records import Evaluation
from fedpeft.models.export import adapter_digest
from fedpeft.participant.loaded_run import set_loaded_run
from fedpeft.reporting.summary_table import interval
from fedpeft.reporting.text import count_noun, direction, metric_name, metric_value, printable
from fedpeft.simulation.engine import run_metrics
from fedpeft.simulation.parallel_scoring import TEST, Scorer, batches_of
from fedpeft.workers import open_workers

_BATCHES_PER_WORKER = 4  # with fewer, starting a process costs more than it saves


def evaluate_command(
    adapter: Path, run_file: Path | None, overrides: Sequence[str], *, as_json: bool
) -> None:
    """Measure an adapter as a run's last round does, and print the scores.

    The numbers are those of the round, digit for digit: same rows, batches, intervals and one thread per
    process.

    Raises:
        FedPEFTError: no adapter, no run file, rows or a model that cannot be used.
    """
    folder, run = adapter_and_run(adapter, run_file, overrides)
    digest = adapter_digest(folder)
    evaluation = evaluate_adapter(run, folder)
    if as_json:
        row = {"adapter": str(folder), "adapter_digest": digest, "run": run.run.name}
        print(json.dumps(row | evaluation.model_dump()))
    else:
        _show(Console(file=sys.stdout, highlight=False), run, folder, evaluation)


def evaluate_adapter(run: RunConfig, folder: Path) -> Evaluation:
    """All metrics of the run, the loss included, on its test set and for each client's held-out rows.

    Raises:
        DataError: the run has no row to score.
    """
    torch.set_num_threads(1)  # before anything is computed: worker processes are forked from here
    metrics = run_metrics(run)
    resident = resident_with_adapter(run, folder)
    set_loaded_run(resident)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    width = max(1, min(cores, len(batches_of(resident, TEST)) // _BATCHES_PER_WORKER))
    if resident.device.type != "cpu":  # processes forked after CUDA began cannot use it
        width = 1
    with open_workers(width) as workers:
        evaluation = Scorer(resident, metrics, workers).evaluate({})
    if evaluation is None:
        raise DataError("the run has no test rows; set data.test, or data.heldout above 0")
    return evaluation


def _show(console: Console, run: RunConfig, folder: Path, evaluation: Evaluation) -> None:
    """A row per metric: value, interval, and the spread over clients."""
    count = next(iter(evaluation.scores.values())).count
    where = "data.test" if run.data.test is not None else "the clients' held-out rows"
    title = Text(f"{printable(run.run.name)} · {count_noun(count, 'test row')} of {where}", style="bold")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("metric", no_wrap=True)
    for heading in ("value", "95% interval", "worst client", "median client"):
        table.add_column(heading, justify="right", no_wrap=True)
    for metric, score in evaluation.scores.items():
        higher = METRICS[metric].higher_is_better
        table.add_row(
            f"{metric_name(metric)} {direction(higher)}",
            metric_value(metric, score.value),
            interval(metric, score),
            *_spread(metric, evaluation, higher),
        )
    console.print(table)
    console.print(Text(f"adapter  {printable(str(folder))}"), soft_wrap=True)


def _spread(metric: str, evaluation: Evaluation, higher: bool) -> tuple[str, str]:
    values = sorted(evaluation.clients.get(metric, {}).values(), reverse=not higher)
    if not values:
        return metric_value(metric, None), metric_value(metric, None)
    middle = len(values) // 2
    median = values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2
    return metric_value(metric, values[0]), metric_value(metric, median)
