"""Which numbers leave with an update: by name, and not those that say how few rows there are."""

from __future__ import annotations

import logging

import pytest

from fedpeft.flower.disclosure import Disclosure

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
