"""How the aggregation error is told."""

from __future__ import annotations

import math

import pytest

from fedpeft.ledger.records import Aggregation, ClientOutcome, Round
from fedpeft.reporting.aggregation_error import aggregation_charts, error_text
from fedpeft.reporting.event_lines import round_line
from fedpeft.reporting.sinks import scalars


def row(number: int, error: float, rank: int = 0) -> Round:
    told = Aggregation(
        rule="flora", error=error, worst=2 * error, worst_module="x.q_proj", norm=1.0, residual_rank=rank
    )
    return Round(round=number, aggregation=told)


@pytest.mark.parametrize(
    ("error", "words"),
    [(0.0, "0"), (0.0964, "9.64%"), (1.3, "130%"), (2e-6, "0.0002%"), (3.6e-8, "4e-08"), (math.inf, "∞")],
)
def test_errors_in_words(error: float, words: str) -> None:
    assert error_text(error) == words


def test_a_round_tells_its_error_and_what_is_kept_frozen() -> None:
    assert "aggregation error 9.64%, frozen rank 48" in round_line(row(2, 0.0964, 48), 3, "loss")
    assert "frozen" not in round_line(row(2, 0.0964), 3, "loss")
    assert "aggregation" not in round_line(Round(round=2), 3, "loss")
    assert ("train/aggregation_error", 0.0964, 2) in list(scalars(row(2, 0.0964), None, 3))


def test_a_round_tells_the_ranks_that_clients_have_left() -> None:
    def told(*ranks: int | None) -> str:
        outcomes = tuple(ClientOutcome(client="a", status="folded", rank=rank) for rank in ranks)
        return round_line(Round(round=1, outcomes=outcomes), 3, "loss")

    assert "ranks 3 to 8" in told(8, None, 3)
    assert "ranks 5 ·" in told(5, 5)
    assert "ranks" not in told(None)


def test_the_chart_is_of_rounds_that_were_measured() -> None:
    assert aggregation_charts([Round(round=1)]) == []
    (chart,) = aggregation_charts([Round(round=0), row(1, 0.2), row(2, 0.1)])
    assert chart.title == "Aggregation error of flora, by round"
    assert "10% away" in chart.svg
    assert "20% in x.q_proj" in chart.svg
