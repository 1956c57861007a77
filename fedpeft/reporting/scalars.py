"""The scalars of an exact seed space: their range round by round, and their sizes over the run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from fedpeft.ledger.records import Round, Scalars
from fedpeft.reporting.charts import Chart, ChartKey, round_axis
from fedpeft.reporting.svg import COLOUR, draw


def scalar_charts(rounds: Sequence[Round]) -> list[Chart]:
    """Two charts; none for runs whose updates hold no scalars, or hide them."""
    known = [(row.round, row.scalars) for row in rounds if row.scalars is not None]
    return [_range_chart(known), _size_chart([scalars for _, scalars in known])] if known else []


def _range_chart(known: Sequence[tuple[int, Scalars]]) -> Chart:
    numbers = [number for number, _ in known]
    columns = list(zip(*(scalars.quantiles for _, scalars in known), strict=True))
    _, low, lower, middle, upper, high, _ = columns

    def paint(axes: Any) -> None:
        for below, above, strength in ((low, high, 0.16), (lower, upper, 0.3)):
            if len(numbers) == 1:
                axes.vlines(numbers, below, above, color=COLOUR["federated"], alpha=strength, linewidth=6)
            else:
                axes.fill_between(
                    numbers, below, above, color=COLOUR["federated"], alpha=strength, linewidth=0
                )
        axes.plot(numbers, middle, color=COLOUR["federated"], marker="o" if len(numbers) <= 40 else None)
        axes.set_ylabel("quanta")
        round_axis(axes)

    last = known[-1][1]
    words = (
        f"Half of the scalars of round {numbers[-1]} lie from {lower[-1]:,.0f} to {upper[-1]:,.0f} quanta."
    )
    return Chart(
        "Scalars that clients sent, by round",
        draw("scalars", words, paint),
        (ChartKey("median", "federated", "line"), ChartKey("middle 50% and 90%", "federated", "band")),
        f"{words} The extremes are {last.quantiles[0]:,.0f} and {last.quantiles[-1]:,.0f}; no zeros.",
    )


def _size_chart(known: Sequence[Scalars]) -> Chart:
    """Counts over all rounds by sign and power of two: the only bins that no run outgrows."""
    negative = [sum(counts) for counts in zip_longest(*(part.negative for part in known), fillvalue=0)]
    positive = [sum(counts) for counts in zip_longest(*(part.positive for part in known), fillvalue=0)]
    bits = len(positive)

    def paint(axes: Any) -> None:
        axes.bar([-place - 1 for place in range(bits)], negative, width=0.8, color=COLOUR["alone"])
        axes.bar([place + 1 for place in range(bits)], positive, width=0.8, color=COLOUR["federated"])
        every = -(-bits // 4)  # more labels would run into each other
        places = [place for place in range(1, bits + 1) if (bits - place) % every == 0]
        axes.set_xticks([*(-place for place in reversed(places)), *places])
        axes.set_xticklabels(
            [*(f"−2^{place - 1}" for place in reversed(places)), *(f"2^{place - 1}" for place in places)]
        )
        axes.set_xlabel("quanta, from this power of two to the next")
        axes.set_ylabel("scalars")

    total = sum(negative) + sum(positive)
    words = f"{total:,} scalars, {sum(negative):,} of them negative, by the power of two of their size."
    return Chart(
        "Sizes of all scalars",
        draw("scalar-sizes", words, paint),
        (ChartKey("negative", "alone", "area"), ChartKey("positive", "federated", "area")),
    )
