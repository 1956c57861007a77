"""Further places that receive a run's rows beside `metrics.jsonl`, chosen by name from one table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from fedpeft.errors import MissingExtraError, UsageError
from fedpeft.ledger.records import Baseline, Evaluation, Finished, Round, Row, Started
from fedpeft.plugins import EntryTable, offers
from fedpeft.reporting.summary import spread_of

Scalar = tuple[str, float, int]  # tag, value, step


class MetricSink(Protocol):
    """Receives every row of a run in order, once; `close` ends it, after an error too."""

    def write(self, row: Row) -> None:
        """Take one row."""

    def close(self) -> None:
        """Flush and release; further calls do nothing."""


class _ScalarWriter(Protocol):
    """The part of TensorBoard's `SummaryWriter` that is used."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...

    def close(self) -> None: ...


class _TensorBoardSink:
    """Writes the scalars of each row as TensorBoard events; the step is the round."""

    def __init__(self, writer: _ScalarWriter) -> None:
        self._writer = writer
        self._started: Started | None = None
        self._round = 0

    def write(self, row: Row) -> None:
        """Write what the row measures."""
        if isinstance(row, Started):
            self._started = row
        if isinstance(row, Round):
            self._round = row.round
        for tag, value, step in scalars(row, self._started, self._round):
            self._writer.add_scalar(tag, value, global_step=step)

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()


def scalars(row: Row, started: Started | None, last_round: int) -> Iterator[Scalar]:
    """Every number of a row worth a curve, with its tag and step; values that are not finite are left out.

    Args:
        row: any row.
        started: the run's first row; without it the spread over clients is left out.
        last_round: the step of rows that belong to no round (baselines, the end).
    """
    found: Iterator[Scalar] = iter(())
    if isinstance(row, Round):
        found = _round_scalars(row, started)
    elif isinstance(row, Baseline):
        found = _baseline_scalars(row, last_round)
    elif isinstance(row, Finished):
        found = iter((("cost/wall_s", row.wall_s, last_round),))
    return (scalar for scalar in found if math.isfinite(scalar[1]))


def _round_scalars(row: Round, started: Started | None) -> Iterator[Scalar]:
    step = row.round
    if row.evaluation is not None:
        yield from _evaluation_scalars("test", row.evaluation, step)
        if started is not None:
            yield from _spread_scalars(row.evaluation, started, step)
    if row.train_loss is not None:
        yield "train/loss", row.train_loss, step
    if row.state_norm_change is not None:
        yield "train/state_norm_change", row.state_norm_change, step
    if row.epsilon is not None:
        yield "privacy/epsilon", row.epsilon, step
    if row.aggregation is not None:
        yield "train/aggregation_error", row.aggregation.error, step
    if row.outcomes:
        yield "bytes/up", float(sum(item.bytes_up for item in row.outcomes)), step
        yield "bytes/down", float(sum(item.bytes_down for item in row.outcomes)), step
        yield "clients/asked", float(len(row.outcomes)), step
        yield "clients/folded", float(sum(item.status == "folded" for item in row.outcomes)), step
    if row.staleness:
        total = sum(age * count for age, count in enumerate(row.staleness))
        yield "clients/staleness", total / sum(row.staleness), step
        yield "clients/most_staleness", float(len(row.staleness) - 1), step
    for direction, leg in (("up", row.up), ("down", row.down)):
        if leg is not None and leg.distortion is not None and leg.cosine is not None:
            yield f"distortion/{direction}", leg.distortion, step
            yield f"cosine/{direction}", leg.cosine, step
    yield "cost/round_wall_s", row.wall_s, step


def _evaluation_scalars(prefix: str, evaluation: Evaluation, step: int) -> Iterator[Scalar]:
    for metric, score in evaluation.scores.items():
        yield f"{prefix}/{metric}", score.value, step


def _spread_scalars(evaluation: Evaluation, started: Started, step: int) -> Iterator[Scalar]:
    for metric in evaluation.clients:
        spread = spread_of(evaluation, started, metric)
        if spread is not None:
            yield f"spread/{metric}/worst", spread.worst, step
            yield f"spread/{metric}/p10", spread.p10, step
            yield f"spread/{metric}/median", spread.median, step


def _baseline_scalars(row: Baseline, step: int) -> Iterator[Scalar]:
    """The baseline's value, of `local` the mean over the clients."""
    evaluations = list(row.evaluations.values())
    for metric in evaluations[0].scores if evaluations else ():
        values = [item.scores[metric].value for item in evaluations if metric in item.scores]
        yield f"baseline/{row.name}/{metric}", math.fsum(values) / len(values), step


def _tensorboard(folder: Path, first_round: int) -> MetricSink:
    try:
        # The package itself first: its absence shows at once, torch's wrapper would import torch before.
        import tensorboard  # noqa: F401
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError(
            f"output.tensorboard needs the package 'tensorboard' ({error}); "
            "install it with pip install 'fedpeft[tensorboard]' or set output.tensorboard=false"
        ) from error
    # A resumed run hides the events of rounds that it does again.
    purge_step = first_round if first_round > 0 else None
    writer: _ScalarWriter = SummaryWriter(log_dir=str(folder / "tensorboard"), purge_step=purge_step)
    return _TensorBoardSink(writer)


OpenSink = Callable[[Path, int], MetricSink]
"""Opens a sink, given the run's folder and the first round that will be written."""

SINKS: EntryTable[OpenSink] = EntryTable("sinks", {"tensorboard": _tensorboard}, offers("__call__"))


def open_sink(name: str, folder: Path, first_round: int = 0) -> MetricSink:
    """Open the sink of that name for a run.

    Args:
        name: a key of `SINKS`.
        folder: the run's folder; the sink makes its own below it.
        first_round: the first round that will be written, above 0 for a resumed run.

    Raises:
        UsageError: no sink has that name.
        MissingExtraError: its package is not installed.
    """
    if name not in SINKS:
        raise UsageError(f"no metric sink is called {name!r}; use one of {', '.join(SINKS)}")
    return SINKS[name](folder, first_round)
