"""The charts of the report: what is drawn, its legend and its words."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedpeft.ledger.records import ClientOutcome, Round
from fedpeft.reporting.summary import LineKey, Summary, higher_is_better, spread_of
from fedpeft.reporting.svg import COLOUR, draw
from fedpeft.reporting.text import byte_unit, direction, is_share, metric_name, metric_value

Status = Literal["folded", "late", "dropped", "unavailable", "refused", "failed"]
Mark = Literal["line", "dash", "dot", "dashdot", "area", "band", "point"]

# Baselines as horizontal lines: role of colour, mark, matplotlib's dash pattern.
_BASELINES: tuple[tuple[LineKey, str, str, Mark, Any], ...] = (
    ("pooled", "pooled-data oracle", "pooled", "dashdot", (0, (6, 2, 1, 2))),
    ("alone-mean", "each client alone, mean", "alone", "dash", (0, (5, 3))),
    ("zero-shot", "zero-shot base model", "start", "dot", (0, (1, 2))),
)
# What became of a client, from the bottom of the stack to its top; each has a colour of its name.
_STATUSES: tuple[Status, ...] = ("folded", "late", "dropped", "unavailable", "refused", "failed")

_MOST_BARS = 60


@dataclass(frozen=True, slots=True)
class ChartKey:
    """One entry of a legend: its words, the CSS variable of its colour, and how it is drawn."""

    text: str
    role: str
    mark: Mark


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing with its title, its legend and a remark (empty: none)."""

    title: str
    svg: str
    legend: tuple[ChartKey, ...] = ()
    remark: str = ""


def curve_charts(summary: Summary, rounds: Sequence[Round]) -> list[Chart]:
    """One chart per measured metric on the global test set, the primary one first."""
    measured = {name for row in rounds if row.evaluation for name in row.evaluation.scores}
    order = [summary.primary, *(name for name in summary.started.higher_is_better if name != summary.primary)]
    if "loss" in measured:
        measured.discard("perplexity")  # its exponential
    return [_metric_chart(summary, rounds, name) for name in order if name in measured]


def _metric_chart(summary: Summary, rounds: Sequence[Round], metric: str) -> Chart:
    scores = [
        (row.round, row.evaluation.scores[metric])
        for row in rounds
        if row.evaluation
        and metric in row.evaluation.scores
        and math.isfinite(row.evaluation.scores[metric].value)
    ]
    levels = [
        (line.scores[metric].value, key, text, role, mark, dashes)
        for key, text, role, mark, dashes in _BASELINES
        if (line := summary.line(key)) and metric in line.scores and math.isfinite(line.scores[metric].value)
    ]

    def paint(axes: Any) -> None:
        numbers = [number for number, _ in scores]
        values = [score.value for _, score in scores]
        for value, _, _, role, _, dashes in levels:
            axes.axhline(value, color=COLOUR[role], linestyle=dashes, linewidth=1.4)
        _band(
            axes,
            numbers,
            [score.low for _, score in scores],
            [score.high for _, score in scores],
            "federated",
        )
        axes.plot(numbers, values, color=COLOUR["federated"], marker=_marker(numbers))
        ends = [end for _, score in scores for end in (score.low, score.high)]
        _value_axis(axes, metric, [*ends, *(level[0] for level in levels)])
        round_axis(axes)

    name = metric_name(metric)
    ends = f"from {_point(metric, scores[0])} to {_point(metric, scores[-1])}" if scores else "no values"
    others = "".join(f"; {text} {metric_value(metric, value)}" for value, _, text, *_ in levels)
    arrow = direction(higher_is_better(summary.started, metric))
    legend = [ChartKey("federated", "federated", "line"), ChartKey("95% interval", "federated", "band")]
    return Chart(
        title=f"{_capital(name)} {arrow}",
        svg=draw(f"m-{_slug(metric)}", f"{_capital(name)} per round: federated {ends}{others}.", paint),
        legend=(*legend, *(ChartKey(text, role, mark) for _, _, text, role, mark, _ in levels)),
    )


def training_charts(rounds: Sequence[Round]) -> list[Chart]:
    """The clients' training loss, mean and range, round by round."""
    points = [(row.round, row.train_loss) for row in rounds if row.train_loss is not None]
    points = [(number, loss) for number, loss in points if math.isfinite(loss)]
    if not points:
        return []
    ranges = [(row.round, losses) for row in rounds if (losses := _losses(row.outcomes))]

    def paint(axes: Any) -> None:
        numbers = [number for number, _ in points]
        lows, highs = [min(losses) for _, losses in ranges], [max(losses) for _, losses in ranges]
        _band(axes, [number for number, _ in ranges], lows, highs, "alone")
        axes.plot(numbers, [loss for _, loss in points], color=COLOUR["alone"], marker=_marker(numbers))
        _value_axis(axes, "loss", [loss for _, loss in points])
        round_axis(axes)

    alt = f"Training loss per round: from {_point('loss', points[0])} to {_point('loss', points[-1])}."
    legend = [ChartKey("mean, weighted as the updates are", "alone", "line")]
    if ranges:
        legend.append(ChartKey("lowest to highest client", "alone", "band"))
    return [Chart("Training loss, by round ↓", draw("training", alt, paint), tuple(legend))]


def spread_charts(summary: Summary, rounds: Sequence[Round]) -> list[Chart]:
    """The federated model over the clients, each on its own held-out rows, round by round."""
    metric = summary.primary
    spreads = [
        (row.round, spread)
        for row in rounds
        if (spread := spread_of(row.evaluation, summary.started, metric))
    ]
    if not spreads:
        return []
    styles: tuple[tuple[str, str, Mark, Any], ...] = (
        ("median", "federated", "line", "-"),
        ("mean", "ink", "dot", (0, (1, 2))),
        ("p10", "alone", "dash", (0, (5, 3))),
        ("worst", "worst", "line", "-"),
    )

    def paint(axes: Any) -> None:
        numbers = [number for number, _ in spreads]
        for field, role, _, dashes in styles:
            values = [getattr(spread, field) for _, spread in spreads]
            axes.plot(numbers, values, color=COLOUR[role], linestyle=dashes, marker=_marker(numbers))
        every = [value for _, spread in spreads for value in (spread.worst, spread.median, spread.mean)]
        _value_axis(axes, metric, every)
        round_axis(axes)

    last = spreads[-1][1]
    values = ", ".join(f"{field} {metric_value(metric, getattr(last, field))}" for field, *_ in styles)
    arrow = direction(higher_is_better(summary.started, metric))
    return [
        Chart(
            title=f"Spread over the clients, by round: {metric_name(metric)} {arrow}",
            svg=draw("spread", f"Spread over {last.clients} clients per round; at the end {values}.", paint),
            legend=tuple(ChartKey(_SPREAD_WORDS[field], role, mark) for field, role, mark, _ in styles),
            remark="Each client's value is on its own held-out rows, by the federated model.",
        )
    ]


_SPREAD_WORDS = {
    "median": "median client",
    "mean": "mean",
    "p10": "10th percentile from the worse end",
    "worst": "worst client",
}


def traffic_charts(rounds: Sequence[Round]) -> list[Chart]:
    """Bytes of serialised updates over all clients, per round and cumulative; up above zero, down below."""
    rows = [row for row in rounds if row.outcomes]
    up = [sum(item.bytes_up for item in row.outcomes) for row in rows]
    down = [sum(item.bytes_down for item in row.outcomes) for row in rows]
    if not any(up) and not any(down):
        return []
    numbers = [row.round for row in rows]
    legend = (
        ChartKey("up, clients to server", "up", "area"),
        ChartKey("down, server to clients", "down", "area"),
    )
    charts = []
    for name, title, ups, downs in (
        ("bytes", "Bytes per round, all clients", up, down),
        ("total", "Bytes so far, all clients", [*itertools.accumulate(up)], [*itertools.accumulate(down)]),
    ):
        unit, scale = byte_unit(max(*ups, *downs))
        alt = f"{title}: at the end {ups[-1] / scale:.3g} {unit} up and {downs[-1] / scale:.3g} {unit} down."
        svg = draw(name, alt, _mirror_painter(numbers, ups, downs, scale, unit))
        charts.append(Chart(title, svg, legend))
    return charts


def _mirror_painter(
    numbers: Sequence[int], ups: Sequence[int], downs: Sequence[int], scale: int, unit: str
) -> Any:
    def paint(axes: Any) -> None:
        _bars(axes, numbers, [up / scale for up in ups], "up")
        _bars(axes, numbers, [-down / scale for down in downs], "down")
        axes.axhline(0, color=COLOUR["muted"], linewidth=0.8)
        axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
        axes.set_ylabel(unit)
        round_axis(axes)

    return paint


def outcome_charts(rounds: Sequence[Round]) -> list[Chart]:
    """What became of the asked clients, round by round, stacked."""
    rows = [row for row in rounds if row.outcomes]
    if not rows:
        return []
    counts = [Counter(item.status for item in row.outcomes) for row in rows]
    present = [status for status in _STATUSES if any(count[status] for count in counts)]

    def paint(axes: Any) -> None:
        base = [0.0] * len(rows)
        for status in present:
            heights = [count[status] for count in counts]
            _bars(axes, [row.round for row in rows], heights, status, base)
            base = [low + height for low, height in zip(base, heights, strict=True)]
        axes.yaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.set_ylabel("clients")
        axes.set_ylim(0, 1.04 * max(base))
        round_axis(axes)

    total = Counter(item.status for row in rows for item in row.outcomes)
    words = ", ".join(f"{total[status]} {status}" for status in present)
    legend = tuple(ChartKey(f"{status} ({total[status]:,})", status, "area") for status in present)
    return [
        Chart(
            "What became of the asked clients, by round",
            draw("outcomes", f"Over all rounds: {words}.", paint),
            legend,
        )
    ]


def _value_axis(axes: Any, metric: str, values: Iterable[float]) -> None:
    """Shares in percent, from zero unless all values are high; other metrics as they come."""
    if not is_share(metric):
        return
    values = list(values)
    low, high = min(values, default=0.0), max(values, default=1.0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    floor = 0.0 if low < 0.5 else max(0.0, low - 0.25 * (1 - low) - 0.02)
    axes.set_ylim(floor, min(1.01, high + 0.08 * (high - floor) + 0.01))


def round_axis(axes: Any) -> None:
    """Whole numbers, at least one round wide."""
    axes.set_xlabel("round")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    low, high = axes.get_xlim()
    if high - low < 1:
        axes.set_xlim((low + high) / 2 - 0.7, (low + high) / 2 + 0.7)


def _band(
    axes: Any, numbers: Sequence[int], lows: Sequence[float], highs: Sequence[float], role: str
) -> None:
    """The range around a curve; around a single point a bar, since an area would have no width."""
    if len(numbers) == 1:
        axes.vlines(numbers, lows, highs, color=COLOUR[role], alpha=0.35, linewidth=4)
    else:
        axes.fill_between(numbers, lows, highs, color=COLOUR[role], alpha=0.18, linewidth=0)


def _bars(
    axes: Any,
    numbers: Sequence[int],
    heights: Sequence[float],
    role: str,
    base: Sequence[float] | None = None,
) -> None:
    """Bars on top of `base`; where they are too many to be told apart, their outline as one area."""
    base = [0.0] * len(numbers) if base is None else base
    if len(numbers) <= _MOST_BARS:
        axes.bar(numbers, heights, width=0.8, bottom=base, color=COLOUR[role])
        return
    tops = [low + height for low, height in zip(base, heights, strict=True)]
    for part, edges in _runs(numbers):
        axes.stairs(tops[part], edges, baseline=base[part], fill=True, color=COLOUR[role])


def _runs(numbers: Sequence[int]) -> list[tuple[slice, list[float]]]:
    """Unbroken runs of consecutive rounds: where they lie in `numbers`, and the edges of their bars."""
    starts = [i for i, number in enumerate(numbers) if i == 0 or number != numbers[i - 1] + 1]
    parts = [slice(start, end) for start, end in itertools.pairwise([*starts, len(numbers)])]
    return [(part, [numbers[part.start] - 0.5, *(n + 0.5 for n in numbers[part])]) for part in parts]


def _losses(outcomes: Sequence[ClientOutcome]) -> list[float]:
    return [item.loss for item in outcomes if item.loss is not None and math.isfinite(item.loss)]


def _marker(numbers: Sequence[int]) -> str | None:
    """Dots while they are few enough to be told apart."""
    return "o" if len(numbers) <= 40 else None


def _point(metric: str, point: tuple[int, Any]) -> str:
    number, value = point
    return f"{metric_value(metric, getattr(value, 'value', value))} in round {number}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _slug(text: str) -> str:
    return "".join(mark if mark.isascii() and mark.isalnum() else "-" for mark in text)
