"""How old updates were, in words and as a chart."""

from __future__ import annotations

import pytest

from fedpeft.ledger.records import ClientOutcome, Round
from fedpeft.reporting.event_lines import round_line, staleness_text
from fedpeft.reporting.sinks import scalars
from fedpeft.reporting.staleness_chart import rounds_fact, staleness_charts
from fedpeft.reporting.summary import build_summary, summary_json
from tests.reporting.rows import started

ROUNDS = [
    Round(round=1, staleness=(3,), outcomes=(ClientOutcome(client="a", status="folded", staleness=0),)),
    Round(round=2, staleness=(0, 2, 0, 1), outcomes=(ClientOutcome(client="b", status="folded"),)),
]


@pytest.mark.parametrize(
    ("counts", "words"),
    [((3,), "staleness 0"), ((0, 2, 0, 1), "staleness 1.7, 1–3"), ((0, 0, 4), "staleness 2")],
)
def test_in_words(counts: tuple[int, ...], words: str) -> None:
    assert staleness_text(counts) == words


def test_in_a_rounds_line() -> None:
    assert "1/1 client · staleness 1.7, 1–3" in round_line(ROUNDS[1], 2, "exact-match")
    assert "staleness" not in round_line(Round(round=1), 2, "exact-match")


def test_who_joined_with_a_round_is_named() -> None:
    assert "joined: east, \ufffdwest · " in round_line(Round(round=1, joined=("east", "\x1bwest")), 2, "loss")
    many = Round(round=1, joined=tuple("abcdefg"))
    assert "joined: a, b, c, d, e and 2 more" in round_line(many, 2, "loss")
    assert "joined" not in round_line(Round(round=1), 2, "loss")


def test_over_the_run() -> None:
    summary = build_summary([started(), *ROUNDS])
    assert summary.staleness == (3, 2, 0, 1)
    told = summary_json(summary)["staleness"]
    assert told == {"mean": pytest.approx(5 / 6), "most": 3, "updates": [3, 2, 0, 1]}
    (chart,) = staleness_charts(summary, ROUNDS)
    assert "6 updates, 0.83 rounds old on average and at most 3." in chart.remark
    synchronous = build_summary([started(), Round(round=1)])
    assert summary_json(synchronous)["staleness"] is None
    assert staleness_charts(synchronous, [Round(round=1)]) == []


def test_as_curves() -> None:
    found = {tag: value for tag, value, _ in scalars(ROUNDS[1], None, 2)}
    assert found["clients/staleness"] == pytest.approx(5 / 3)
    assert found["clients/most_staleness"] == 3.0


def test_the_run_file_in_a_line() -> None:
    buffer = {"size": 8, "concurrency": 16, "max_staleness": 10, "staleness_weight": {"kind": "hinge"}}
    fact = rounds_fact({"federation": {"mode": "buffered", "buffer": buffer}})
    assert (
        fact == "buffered: 8 updates each, 16 clients at work, staleness weight hinge, at most 10 rounds old"
    )
    assert rounds_fact({"federation": {"mode": "synchronous"}}) == ""
