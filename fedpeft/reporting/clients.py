"""What each client got out of a run: numbers for the report's table, and the chart that compares them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedpeft.ledger.records import Baseline, ClientOutcome, Row
from fedpeft.reporting.charts import Chart, ChartKey
from fedpeft.reporting.summary import (
    Summary,
    clients_in,
    higher_is_better,
    last_evaluated,
    rounds_in_order,
)
from fedpeft.reporting.svg import COLOUR, draw
from fedpeft.reporting.text import count_noun, direction, is_share, metric_name, metric_value, printable

_NAMED = 40  # clients that fit as named lines; above that they are drawn by rank


@dataclass(frozen=True, slots=True)
class ClientRow:
    """One client: training rows, primary metric on its own held-out rows, tasks, bytes over the run."""

    name: str
    rows: int
    federated: float | None
    alone: float | None
    asked: int
    folded: int
    bytes_up: int
    bytes_down: int


def client_rows(summary: Summary, rows: Sequence[Row]) -> list[ClientRow]:
    """Every client of the run, best federated value first, unmeasured ones last, ties by name."""
    rounds, metric = rounds_in_order(rows), summary.primary
    last = last_evaluated(rounds)
    federated = clients_in(last.evaluation, metric) if last and last.round > 0 else {}
    local = next((row for row in reversed(rows) if isinstance(row, Baseline) and row.name == "local"), None)
    evaluations = local.evaluations if local else {}
    outcomes: dict[str, list[ClientOutcome]] = {name: [] for name in summary.started.clients}
    for item in (item for row in rounds for item in row.outcomes):
        outcomes.setdefault(item.client, []).append(item)
    made = []
    for name, own in sorted(outcomes.items()):
        made.append(
            ClientRow(
                name=name,
                rows=summary.started.clients.get(name, 0),
                federated=_finite(federated.get(name)),
                alone=_finite(clients_in(evaluations.get(name), metric).get(name)),
                asked=len(own),
                folded=sum(item.status == "folded" for item in own),
                bytes_up=sum(item.bytes_up for item in own),
                bytes_down=sum(item.bytes_down for item in own),
            )
        )
    sign = -1 if higher_is_better(summary.started, metric) else 1
    return sorted(made, key=lambda row: math.inf if row.federated is None else sign * row.federated)


def client_charts(summary: Summary, clients: Sequence[ClientRow]) -> list[Chart]:
    """Federated against alone for each client; none where no client was measured on its own rows."""
    measured = [row for row in clients if row.federated is not None]
    if not measured:
        return []
    compared = [row for row in measured if row.alone is not None]
    legend = [ChartKey("federated model", "federated", "point")]
    if compared:
        legend.append(ChartKey("the client's own model, trained alone", "alone", "point"))
    arrow = direction(higher_is_better(summary.started, summary.primary))
    against = ", federated against alone" if compared else ""
    title = f"Each client{against}: {metric_name(summary.primary)} {arrow}"
    named = len(measured) <= _NAMED
    alt = _words(summary, measured, compared)
    if named:
        svg = draw("clients", alt, _by_name(summary, measured), height=0.75 + 0.21 * len(measured))
    else:
        svg = draw("clients", alt, _by_rank(summary, measured))
    return [Chart(title, svg, tuple(legend), compare_with_alone(summary, compared))]


def _by_name(summary: Summary, rows: Sequence[ClientRow]) -> Any:
    """A line per client, the best on top, with a bar between its two points."""

    def paint(axes: Any) -> None:
        places = list(range(len(rows)))[::-1]
        for place, row in zip(places, rows, strict=True):
            if row.alone is not None:
                axes.plot([row.alone, row.federated], [place, place], color=COLOUR["grid"], linewidth=3)
                axes.plot([row.alone], [place], "o", color=COLOUR["alone"], markersize=6)
            axes.plot([row.federated], [place], "o", color=COLOUR["federated"], markersize=6)
        # Names come from outside: never read as mathematical markup.
        axes.set_yticks(places, [printable(row.name, 18) for row in rows], parse_math=False)
        axes.set_ylim(-0.7, len(rows) - 0.3)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", visible=True)
        _share_ticks(axes.xaxis, summary.primary)

    return paint


def _by_rank(summary: Summary, rows: Sequence[ClientRow]) -> Any:
    """All clients side by side, the best first."""

    def paint(axes: Any) -> None:
        compared = [(rank, row.alone) for rank, row in enumerate(rows, 1) if row.alone is not None]
        axes.plot(
            [rank for rank, _ in compared],
            [value for _, value in compared],
            "o",
            color=COLOUR["alone"],
            markersize=2.5,
            alpha=0.7,
        )
        axes.plot(
            range(1, len(rows) + 1), [row.federated for row in rows], color=COLOUR["federated"], linewidth=2.2
        )
        axes.set_xlabel("clients, best first")
        _share_ticks(axes.yaxis, summary.primary)

    return paint


def _share_ticks(axis: Any, metric: str) -> None:
    if is_share(metric):
        axis.set_major_formatter(lambda value, _: f"{100 * value:g}%")


def _words(summary: Summary, measured: Sequence[ClientRow], compared: Sequence[ClientRow]) -> str:
    best, worst = measured[0], measured[-1]
    values = [
        f"{end} {printable(row.name, 40)} {metric_value(summary.primary, row.federated)}"
        for end, row in (("best", best), ("worst", worst))
    ]
    tail = f" {compare_with_alone(summary, compared)}" if compared else ""
    return f"Federated model on each client's own rows: {', '.join(values)}.{tail}"


def compare_with_alone(summary: Summary, compared: Sequence[ClientRow]) -> str:
    """How many clients gain by taking part, how many lose, and for how many it makes no difference."""
    if not compared:
        return ""
    sign = 1 if higher_is_better(summary.started, summary.primary) else -1
    gains = [sign * ((row.federated or 0.0) - (row.alone or 0.0)) for row in compared]
    better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    equal = len(gains) - better - worse
    clients = count_noun(len(compared), "client")
    return (
        f"On their own rows the federated model is better for {better:,}, equal for {equal:,} and worse for"
        f" {worse:,} of {clients}."
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
