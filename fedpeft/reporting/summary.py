"""The outcome of a run in a dozen numbers, and the table that shows them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

import numpy as np

from fedpeft.errors import StateError
from fedpeft.ledger.records import Baseline, Evaluation, Finished, Round, Row, Score, Started
from fedpeft.reporting.transfers import TransferSummary, summarise_transfers

LineKey = Literal[
    "start", "zero-shot", "alone-mean", "alone-worst", "federated", "pooled", "full-model", "plugged-in"
]

OFFSITE: tuple[LineKey, ...] = ("full-model", "plugged-in")
# What each line is called, in the order of the table.
LABELS: dict[LineKey, str] = {
    "start": "before training",
    "zero-shot": "zero-shot base model",
    "alone-mean": "each client alone, mean",
    "alone-worst": "each client alone, worst",
    "federated": "federated",
    "pooled": "pooled-data oracle",
    "full-model": "full model, untrained",
    "plugged-in": "plugged into full model",
}


@dataclass(frozen=True, slots=True)
class ModelLine:
    """One model, or the mean over several, on the global test set.

    `detail` names the client or the round it came from, or is empty.
    """

    key: LineKey
    detail: str
    scores: Mapping[str, Score]

    @property
    def label(self) -> str:
        """The line's name for people."""
        return LABELS[self.key]


@dataclass(frozen=True, slots=True)
class Spread:
    """One model over the clients, each on its own held-out rows.

    `p10` is the value that nine clients in ten reach or better: the 10th percentile where higher is better,
    the 90th where lower is, linearly interpolated.
    """

    worst: float
    worst_client: str
    p10: float
    median: float
    mean: float
    clients: int


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of serialised updates per client.

    `*_total` is over the run, the mean over the clients that were asked at least once; `*_round` is the mean
    over the single transfers.
    """

    up_total: float
    up_round: float
    down_total: float
    down_round: float


@dataclass(frozen=True, slots=True)
class Summary:
    """A run at a glance.

    `lines` holds what is known, in the order of `LABELS`; parts that the rows do not have are None.
    """

    started: Started
    lines: tuple[ModelLine, ...]
    spread: Spread | None
    traffic: Traffic | None
    rounds_done: int
    finished: Finished | None
    wall_s: float
    journeys: tuple[TransferSummary, ...] = ()
    epsilon: float | None = None  # spent so far; None without differential privacy
    epsilon_cohort: float | None = None  # the same against whoever sees secret cohorts; None: there are none
    staleness: tuple[int, ...] = ()  # of buffered rounds: entry s counts the updates of staleness s

    @property
    def primary(self) -> str:
        """Name of the metric that the run is judged by."""
        return self.started.primary_metric

    def line(self, key: LineKey) -> ModelLine | None:
        """The line of that key, if the run has it."""
        return next((line for line in self.lines if line.key == key), None)

    def score(self, key: LineKey) -> Score | None:
        """The primary score of that line, if there is one."""
        line = self.line(key)
        return line.scores.get(self.primary) if line else None


def build_summary(rows: Iterable[Row]) -> Summary:
    """Condense the rows of a run, finished or not.

    Rows may come in any order; of two rows of one round or one baseline the later counts.

    Raises:
        StateError: there is no `started` row, so that nothing says what the run is.
    """
    rows = list(rows)
    started = next((row for row in reversed(rows) if isinstance(row, Started)), None)
    if started is None:
        raise StateError(
            "the metrics hold no 'started' row, and a summary needs it; give the rows of a whole run"
        )
    finished = next((row for row in reversed(rows) if isinstance(row, Finished)), None)
    rounds = rounds_in_order(rows)
    baselines: dict[str, Baseline] = {row.name: row for row in rows if isinstance(row, Baseline)}
    last = last_evaluated(rounds)
    return Summary(
        started=started,
        lines=_lines(started, rounds, baselines),
        spread=spread_of(last.evaluation, started) if last is not None and last.round > 0 else None,
        traffic=_traffic(rounds, finished),
        rounds_done=rounds[-1].round if rounds else 0,
        finished=finished,
        wall_s=finished.wall_s if finished else _wall_so_far(rounds, baselines),
        journeys=summarise_transfers(started, rounds),
        staleness=tuple(sum(ages) for ages in zip_longest(*(row.staleness for row in rounds), fillvalue=0)),
        epsilon=next((row.epsilon for row in reversed(rounds) if row.epsilon is not None), None),
        epsilon_cohort=next(
            (row.epsilon_cohort for row in reversed(rounds) if row.epsilon_cohort is not None), None
        ),
    )


def rounds_in_order(rows: Iterable[Row]) -> list[Round]:
    """The finished rounds by number, the later of two equal ones."""
    by_number = {row.round: row for row in rows if isinstance(row, Round)}
    return [by_number[number] for number in sorted(by_number)]


def last_evaluated(rounds: Sequence[Round]) -> Round | None:
    """The last round that was evaluated."""
    return next((row for row in reversed(rounds) if row.evaluation is not None), None)


def spread_of(evaluation: Evaluation | None, started: Started, metric: str | None = None) -> Spread | None:
    """Spread of an evaluation over the clients in one metric (default: the primary one), or None."""
    metric = metric or started.primary_metric
    values = {
        client: value for client, value in clients_in(evaluation, metric).items() if not math.isnan(value)
    }
    if not values:
        return None
    higher = higher_is_better(started, metric)
    worst = (min if higher else max)(sorted(values), key=lambda client: values[client])
    column = np.array(list(values.values()), dtype=np.float64)
    return Spread(
        worst=values[worst],
        worst_client=worst,
        p10=float(np.percentile(column, 10 if higher else 90)),
        median=float(np.median(column)),
        mean=float(column.mean()),
        clients=len(values),
    )


def clients_in(evaluation: Evaluation | None, metric: str) -> Mapping[str, float]:
    """Each client's own value of the metric; empty where it was not measured."""
    return evaluation.clients.get(metric, {}) if evaluation is not None else {}


def higher_is_better(started: Started, metric: str) -> bool:
    """The metric's better side; one that the run does not declare counts as higher is better."""
    return started.higher_is_better.get(metric, True)


def metrics_of(summary: Summary) -> list[str]:
    """Every metric of the table: the primary one, then the others in the run's order."""
    present = {name for line in summary.lines for name in line.scores}
    declared = [name for name in summary.started.higher_is_better if name in present]
    others = [*declared, *sorted(present - set(declared))]
    return [summary.primary, *(name for name in others if name != summary.primary)]


def summary_json(summary: Summary) -> dict[str, Any]:
    """The summary as plain JSON values; infinities and NaN become null."""
    started = summary.started
    spent = {"epsilon": summary.epsilon, "epsilon_cohort": summary.epsilon_cohort}
    plain = {
        "run": started.run_name,
        "run_digest": started.run_digest,
        "seed": started.seed,
        "finished": summary.finished is not None,
        "rounds_done": summary.rounds_done,
        "rounds": started.rounds,
        "clients": len(started.clients),
        "primary_metric": summary.primary,
        "higher_is_better": dict(started.higher_is_better),
        "models": {
            line.key: {
                "detail": line.detail,
                "scores": {name: score.model_dump() for name, score in line.scores.items()},
            }
            for line in summary.lines
        },
        "spread": dataclasses.asdict(summary.spread) if summary.spread else None,
        "bytes_per_client": dataclasses.asdict(summary.traffic) if summary.traffic else None,
        "transfers": {journey.direction: dataclasses.asdict(journey) for journey in summary.journeys},
        "staleness": _staleness(summary.staleness),
        "privacy": started.privacy.model_dump() | spent if started.privacy else None,
        "stopped": summary.finished.stopped if summary.finished else "",
        "adapter_digest": summary.finished.adapter_digest if summary.finished else None,
        "wall_s": summary.wall_s,
    }
    finite: dict[str, Any] = _finite(plain)
    return finite


def _lines(
    started: Started, rounds: Sequence[Round], baselines: Mapping[str, Baseline]
) -> tuple[ModelLine, ...]:
    """Every line that the rows can fill, in the order of `LABELS`."""
    first, last = (rounds[0] if rounds else None), last_evaluated(rounds)
    lines: list[ModelLine] = []
    if "zero-shot" in baselines:
        lines += _single("zero-shot", baselines["zero-shot"])
    elif first is not None and first.round == 0 and first.evaluation is not None:
        lines.append(ModelLine("start", "round 0", first.evaluation.scores))
    if "local" in baselines:
        lines += _alone(started, baselines["local"])
    if last is not None and last.round > 0 and last.evaluation is not None:
        lines.append(ModelLine("federated", f"round {last.round}", last.evaluation.scores))
    if "pooled" in baselines:
        lines += _single("pooled", baselines["pooled"])
    for key in OFFSITE:
        if key in baselines:
            lines += _single(key, baselines[key])
    return tuple(lines)


def _single(key: LineKey, baseline: Baseline) -> list[ModelLine]:
    return [ModelLine(key, "", evaluation.scores) for evaluation in list(baseline.evaluations.values())[:1]]


def _alone(started: Started, baseline: Baseline) -> list[ModelLine]:
    """Mean and worst of the models that clients trained alone."""
    metric, models = started.primary_metric, baseline.evaluations
    if not models:
        return []
    everywhere = [
        name
        for name in next(iter(models.values())).scores
        if all(name in evaluation.scores for evaluation in models.values())
    ]
    mean = {name: _mean([evaluation.scores[name] for evaluation in models.values()]) for name in everywhere}
    lines = [ModelLine("alone-mean", "", mean)]
    if metric in everywhere:
        pick = min if higher_is_better(started, metric) else max
        worst = pick(sorted(models), key=lambda client: models[client].scores[metric].value)
        lines.append(ModelLine("alone-worst", worst, models[worst].scores))
    return lines


def _mean(scores: Sequence[Score]) -> Score:
    """Mean of several models' scores on one test set.

    The ends are the means of the ends: the interval if all scores moved together with the draw of the test
    set, so rather too wide than too narrow.
    """
    return Score(
        value=math.fsum(score.value for score in scores) / len(scores),
        low=math.fsum(score.low for score in scores) / len(scores),
        high=math.fsum(score.high for score in scores) / len(scores),
        count=min(score.count for score in scores),
    )


def _traffic(rounds: Sequence[Round], finished: Finished | None) -> Traffic | None:
    outcomes = [outcome for row in rounds for outcome in row.outcomes]
    asked = len({outcome.client for outcome in outcomes})
    up = [outcome.bytes_up for outcome in outcomes if outcome.bytes_up > 0]
    down = [outcome.bytes_down for outcome in outcomes if outcome.bytes_down > 0]
    if not asked and (finished is None or not finished.bytes_down_per_client):
        return None
    return Traffic(
        up_total=finished.bytes_up_per_client if finished else sum(up) / asked,
        up_round=sum(up) / len(up) if up else 0.0,
        down_total=finished.bytes_down_per_client if finished else sum(down) / asked,
        down_round=sum(down) / len(down) if down else 0.0,
    )


def mean_staleness(counts: Sequence[int]) -> float:
    """Over all updates; 0 without any."""
    return sum(age * count for age, count in enumerate(counts)) / sum(counts) if sum(counts) else 0.0


def _staleness(counts: Sequence[int]) -> dict[str, Any] | None:
    """Null for synchronous rounds."""
    if not counts:
        return None
    return {"mean": mean_staleness(counts), "most": len(counts) - 1, "updates": list(counts)}


def _wall_so_far(rounds: Sequence[Round], baselines: Mapping[str, Baseline]) -> float:
    return math.fsum(row.wall_s for row in rounds) + math.fsum(row.wall_s for row in baselines.values())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
