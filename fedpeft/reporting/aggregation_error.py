"""The aggregation error of a run under a rule for LoRA's factors: in words, and round by round."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fedpeft.ledger.records import Aggregation, Round
from fedpeft.reporting.charts import Chart, ChartKey, round_axis
from fedpeft.reporting.svg import COLOUR, draw
from fedpeft.reporting.text import printable

_ROUNDING = 1e-6  # below it, what is left is the rounding of stored factors


def error_text(error: float) -> str:
    """An aggregation error as a person reads it: "9.6%", or "4e-08" where it is rounding alone."""
    if not math.isfinite(error):
        return "∞"
    if error == 0.0:
        return "0"
    return f"{100 * error:.3g}%" if error >= _ROUNDING else f"{error:.0e}"


def aggregation_text(row: Aggregation) -> str:
    """One round's, for its line: "aggregation error 9.6%, frozen rank 48"."""
    frozen = f", frozen rank {row.residual_rank}" if row.residual_rank else ""
    return f"aggregation error {error_text(row.error)}{frozen}"


def ranks_text(row: Round) -> str:
    """What self-pruning has left of the clients' ranks: "ranks 3 to 8"; empty where nobody gives any up."""
    ranks = [outcome.rank for outcome in row.outcomes if outcome.rank is not None]
    if not ranks:
        return ""
    least, most = min(ranks), max(ranks)
    return f"ranks {least}" if least == most else f"ranks {least} to {most}"


def aggregation_charts(rounds: Sequence[Round]) -> list[Chart]:
    """One chart; none for runs without such a rule."""
    known = [(row.round, row.aggregation) for row in rounds if row.aggregation is not None]
    if not known:
        return []
    numbers = [number for number, _ in known]
    marker = "o" if len(numbers) <= 40 else None

    def paint(axes: Any) -> None:
        for values, role in (
            ([100 * row.worst for _, row in known], "alone"),
            ([100 * row.error for _, row in known], "federated"),
        ):
            axes.plot(numbers, values, color=COLOUR[role], marker=marker)
        axes.set_ylabel("% of the mean of products")
        axes.set_ylim(bottom=0.0)
        round_axis(axes)

    last = known[-1][1]
    words = (
        f"Round {numbers[-1]}: the next adapter is {error_text(last.error)} away from the mean of what the"
        f" clients' adapters compute; {error_text(last.worst)} in {printable(last.worst_module)}."
    )
    legend = (ChartKey("all modules", "federated", "line"), ChartKey("the worst module", "alone", "line"))
    title = f"Aggregation error of {printable(last.rule)}, by round"
    return [Chart(title, draw("aggregation", words, paint), legend, words)]
