"""Metrics as sums over examples: each is a pair of per-example columns whose totals are divided.

So that a metric of any subset (a client, a bootstrap resample) is one division, and shards computed by
different workers join by concatenation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.config.option_tables import unknown_name
from fedpeft.errors import RunFileError
from fedpeft.plugins import EntryTable, instance_of

Column = NDArray[np.float64]  # one value per example
Columns = Mapping[str, Column]

TASKS = ("causal-lm", "sequence-classification")


@dataclass(frozen=True)
class Metric:
    """A ratio of two column totals, after an optional last step.

    Attributes:
        numerator, denominator: column names; the denominator "one" counts examples.
        tasks: where it applies.
        higher_is_better: direction.
        generates: needs generated text, which costs one decoding pass per example.
        finish: applied to the ratio (perplexity is the exponential of the loss).
        summary: one line for people.
    """

    numerator: str
    denominator: str
    tasks: Sequence[str]
    higher_is_better: bool
    summary: str
    generates: bool = False
    finish: Callable[[Any], Any] | None = None


def _perplexity(loss: Any) -> Any:
    return np.exp(np.minimum(loss, 700.0))  # exp overflows float64 beyond 709


_OWN: dict[str, Metric] = {
    "loss": Metric(
        "nll", "tokens", TASKS, False, "mean negative log-likelihood, nats per scored token or class"
    ),
    "perplexity": Metric("nll", "tokens", TASKS[:1], False, "exponential of the loss", finish=_perplexity),
    "accuracy": Metric("correct", "one", TASKS[1:], True, "share of examples whose class is right"),
    "token-accuracy": Metric("correct", "tokens", TASKS[:1], True, "share of answer tokens predicted right"),
    "exact-match": Metric(
        "exact", "one", TASKS[:1], True, "share of answers that greedy decoding gets right to the last token"
    ),
    "rouge-l": Metric(
        "rouge_l", "one", TASKS[:1], True, "ROUGE-L F1 of the generated answer", generates=True
    ),
}

METRICS = EntryTable("metrics", _OWN, instance_of(Metric))


def metrics_of(task: str, asked: Sequence[str], *, answers: bool) -> tuple[str, ...]:
    """The run's metrics, the primary one first; the loss is always among them.

    Args:
        answers: rows have a prompt and an answer.

    Raises:
        RunFileError: an unknown metric, or one that doesn't fit the task.
    """
    problems = []
    for name in asked:
        if name not in METRICS:
            problems.append(unknown_name("evaluation.metrics", name, METRICS))
        elif task not in METRICS[name].tasks:
            problems.append(
                f"evaluation.metrics: {name!r} is for {' or '.join(METRICS[name].tasks)}, the task is {task}"
            )
        elif name in ("exact-match", "rouge-l") and not answers:
            problems.append(
                f"evaluation.metrics: {name!r} compares answers; give data.prompt and data.answer"
            )
    if problems:
        raise RunFileError("run file", problems)
    default = {"sequence-classification": ("accuracy",)}.get(
        task, ("exact-match",) if answers else ("perplexity",)
    )
    return tuple(dict.fromkeys((*(asked or default), "loss")))


def value(metric: str, columns: Columns, rows: NDArray[np.int64] | None = None) -> float:
    """The metric over all examples, or over `rows`; NaN without examples."""
    spec = METRICS[metric]
    numerator = _column(columns, spec.numerator)
    denominator = _column(columns, spec.denominator)
    if rows is not None:
        numerator, denominator = numerator[rows], denominator[rows]
    below = math.fsum(denominator)  # exactly rounded, hence the same for any order of shards
    if not below:
        return math.nan
    ratio = math.fsum(numerator) / below
    return float(spec.finish(ratio)) if spec.finish else ratio


def _column(columns: Columns, name: str) -> Column:
    return np.ones(len(columns["nll"])) if name == "one" else columns[name]


def interval(
    metric: str, columns: Columns, *, resamples: int, rng: np.random.Generator
) -> tuple[float, float]:
    """95% percentile-bootstrap interval over examples (Efron 1979), the ratio recomputed in each resample."""
    spec = METRICS[metric]
    numerator, denominator = _column(columns, spec.numerator), _column(columns, spec.denominator)
    count = len(numerator)
    if count < 2:
        single = value(metric, columns)
        return single, single
    ratios = []
    chunk = max(1, 4_000_000 // count)  # bounds the memory of a resample matrix
    for start in range(0, resamples, chunk):
        picks = rng.integers(count, size=(min(chunk, resamples - start), count))
        below = denominator[picks].sum(axis=1)
        ratios.append(numerator[picks].sum(axis=1) / np.where(below == 0, np.nan, below))
    drawn = np.concatenate(ratios)
    low, high = np.nanpercentile(spec.finish(drawn) if spec.finish else drawn, [2.5, 97.5])
    return float(low), float(high)
