"""The distribution of a round's scalars: counted, written, read back and drawn."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.ledger.records import Round, parse_row
from fedpeft.reporting.html import render_report
from fedpeft.reporting.scalars import scalar_charts
from fedpeft.rounds.scalar_counts import scalars_in, scalars_of
from tests.reporting.rows import started


@given(st.lists(st.lists(st.integers(-(2**40), 2**40), max_size=9), max_size=4))
def test_every_scalar_but_zero_is_counted_once_by_its_size(clients: list[list[int]]) -> None:
    parts = [scalars_in({"amounts": np.array(client, dtype=np.int64)}) for client in clients]
    found = scalars_of([part for part in parts if part is not None])
    sent = [scalar for client in clients for scalar in client if scalar]
    if not sent:
        assert found is None
        return
    assert found is not None
    assert found.count == len(sent)
    assert len(found.negative) == len(found.positive) == max(abs(s).bit_length() for s in sent)
    for bit in range(len(found.positive)):
        assert found.positive[bit] == sum(s > 0 and s.bit_length() == bit + 1 for s in sent)
        assert found.negative[bit] == sum(s < 0 and (-s).bit_length() == bit + 1 for s in sent)
    assert (found.quantiles[0], found.quantiles[-1]) == (min(sent), max(sent))
    assert found.quantiles[3] == pytest.approx(float(np.median(sent)))


def test_floats_have_no_scalars() -> None:
    assert scalars_in({"amounts": np.zeros(3, dtype=np.float32)}) is None
    assert scalars_in({"layer.weight": np.zeros(3, dtype=np.int64)}) is None


def test_the_report_draws_them_and_a_run_without_them_has_no_such_section() -> None:
    rng = np.random.default_rng(0)
    sent = [scalars_in({"amounts": rng.integers(-40 * n, 40 * n, 200)}) for n in (1, 2, 3)]
    rounds = [
        Round(round=n, scalars=scalars_of([part])) for n, part in enumerate(sent, 1) if part is not None
    ]
    again = [parse_row(row.model_dump_json()) for row in rounds]
    assert again == rounds
    page = render_report("", [started(), *rounds])
    assert ">Scalars<" in page
    labels = re.findall(r'aria-label="([^"]*)"', page)
    total = sum(row.scalars.count for row in rounds if row.scalars)
    assert any(label.startswith(f"{total:,} scalars, ") for label in labels)
    assert any(label.startswith("Half of the scalars of round 3 lie from -") for label in labels)
    assert len(scalar_charts(rounds[:1])) == 2
    assert scalar_charts([Round(round=1)]) == []
    assert ">Scalars<" not in render_report("", [started(), Round(round=1)])
