"""How old the states were that the updates of buffered rounds started from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedpeft.ledger.records import Round
from fedpeft.reporting.charts import Chart, ChartKey, round_axis
from fedpeft.reporting.summary import Summary, mean_staleness
from fedpeft.reporting.svg import COLOUR, draw
from fedpeft.reporting.text import count_noun


def staleness_charts(summary: Summary, rounds: Sequence[Round]) -> list[Chart]:
    """One chart; none for synchronous rounds."""
    known = [(row.round, row.staleness) for row in rounds if row.staleness]
    if not known:
        return []
    numbers = [number for number, _ in known]
    means = [mean_staleness(counts) for _, counts in known]
    lows = [next(age for age, count in enumerate(counts) if count) for _, counts in known]
    highs = [len(counts) - 1 for _, counts in known]

    def paint(axes: Any) -> None:
        if len(numbers) == 1:
            axes.vlines(numbers, lows, highs, color=COLOUR["federated"], alpha=0.3, linewidth=6)
        else:
            axes.fill_between(numbers, lows, highs, color=COLOUR["federated"], alpha=0.18, linewidth=0)
        axes.plot(numbers, means, color=COLOUR["federated"], marker="o" if len(numbers) <= 40 else None)
        axes.set_ylabel("rounds")
        axes.set_ylim(bottom=0)
        axes.yaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        round_axis(axes)

    total = summary.staleness
    words = (
        f"{count_noun(sum(total), 'update')}, {mean_staleness(total):.2g} rounds old on average and at most"
        f" {len(total) - 1}."
    )
    return [
        Chart(
            "Staleness of the updates, by round",
            draw("staleness", words, paint),
            (ChartKey("mean", "federated", "line"), ChartKey("least to most", "federated", "band")),
            f"{words} The staleness of an update is how many rounds ended while it was made.",
        )
    ]


def rounds_fact(run: Mapping[str, Any]) -> str:
    """How rounds came about, in one line; empty for synchronous ones."""
    federation = run.get("federation", {})
    buffer = federation.get("buffer")
    if federation.get("mode") != "buffered" or not isinstance(buffer, Mapping):
        return ""
    weight = buffer.get("staleness_weight", {}).get("kind", "")
    size, clients, oldest = (int(buffer.get(key, 0)) for key in ("size", "concurrency", "max_staleness"))
    return (
        f"buffered: {count_noun(size, 'update')} each, {count_noun(clients, 'client')} at work,"
        f" staleness weight {weight}, at most {oldest} rounds old"
    )
