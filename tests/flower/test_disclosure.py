"""Which numbers leave with an update: by name, and not those that say how few rows there are."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from fedpeft.config.run_file import build_run
from fedpeft.errors import UpdateError
from fedpeft.rounds.replies import _refuse_weight
from fedpeft.transport.disclosure import Disclosure
from fedpeft.transport.roster import Member, Roster
from fedpeft.wire.codec import Envelope

METRICS = {"loss": 0.5, "steps": 2.0, "examples": 7.0}


@pytest.mark.parametrize(
    ("disclosure", "counts", "told"),
    [
        (Disclosure(), ("examples", "steps"), ["examples", "loss", "steps"]),
        (Disclosure(frozenset()), (), []),
        (Disclosure(frozenset({"loss"})), (), ["loss"]),
        (Disclosure(min_count=8), ("examples", "steps"), ["loss"]),
        (Disclosure(min_count=8), ("examples",), ["loss", "steps"]),
        (Disclosure(min_count=7), ("examples", "steps"), ["examples", "loss", "steps"]),
    ],
)
def test_what_is_told(
    disclosure: Disclosure, counts: tuple[str, ...], told: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert sorted(disclosure.select(METRICS, counts, rows=7)) == told
    withheld = sorted(set(METRICS) - set(told))
    assert ("withheld from the server: " + ", ".join(withheld) in caplog.text) == bool(withheld)
    assert Disclosure.of_node(disclosure.to_config()) == disclosure


def test_counts() -> None:
    assert [Disclosure(min_count=5).count(rows) for rows in (0, 4, 5, 6)] == [0, 0, 5, 6]
    assert Disclosure.of_node({}) == Disclosure()


@pytest.mark.parametrize(
    ("weighting", "weight", "taken"), [("uniform", 1, True), ("uniform", 2, False), ("examples", 1, False)]
)
def test_who_withholds_its_rows_takes_part_where_weights_are_one(
    weighting: str, weight: int, taken: bool
) -> None:
    run = build_run({"run": {"name": "r", "rounds": 1}, "federation": {"weighting": weighting}}, source="t")
    federation: Any = SimpleNamespace(run=run, roster=Roster({"ann": Member(1, 0)}, ""))
    envelope = Envelope({}, "d", 1, "s", "adapter-delta", client="ann", weight=weight)
    with nullcontext() if taken else pytest.raises(UpdateError, match="allows"):
        _refuse_weight(federation, envelope)
