"""The exact sum against fractions: order does not matter, nothing wraps, nothing bad is counted."""

from __future__ import annotations

import random
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.aggregation.exact_sum import HEADROOM_BITS, ExactSum, _add_quanta, prepare_sums
from fedpeft.errors import UpdateError
from fedpeft.updates.update import Layout, Update, arrays_digest, layout_of
from tests.core.strategies import FLOAT, INT, several

EXPONENT = -20
QUANTUM = Fraction(1, 2**20)


def folded(layout: Layout, updates: list[Update], exponent: int = EXPONENT) -> ExactSum:
    total = ExactSum(layout, quantum_exponent=exponent, capacity=len(updates))
    for update in updates:
        total.fold(update)
    return total


def in_quanta(entry: float | int) -> int:
    """Round half to even, in exact arithmetic; integers count as themselves."""
    return entry if isinstance(entry, int) else round(Fraction(entry) / QUANTUM)


@given(several(1, 6))
def test_sums_and_means_equal_exact_arithmetic(case: tuple[Layout, list[Update]]) -> None:
    layout, updates = case
    total = folded(layout, updates)
    weight = sum(update.weight for update in updates)
    assert (total.count, total.total_weight) == (len(updates), weight)
    for name, (_, dtype) in layout.items():
        columns = zip(*(update.arrays[name].ravel().tolist() for update in updates), strict=True)
        exact = [
            sum(in_quanta(entry) * update.weight for entry, update in zip(column, updates, strict=True))
            for column in columns
        ]
        assert total.sums()[name].ravel().tolist() == exact
        unit = Fraction(1) if dtype == INT else QUANTUM
        for came, units in zip(total.mean()[name].ravel().tolist(), exact, strict=True):
            mean = units * unit / weight
            assert abs(Fraction(came) - mean) <= abs(mean) * Fraction(1, 2**51)


@given(several(2, 6), st.integers(0, 2**32))
def test_any_order_gives_the_same_bits(case: tuple[Layout, list[Update]], seed: int) -> None:
    layout, updates = case
    shuffled = random.Random(seed).sample(updates, len(updates))
    assert arrays_digest(folded(layout, updates).mean()) == arrays_digest(folded(layout, shuffled).mean())


def one(value: float, weight: int = 1, dtype: str = "float32") -> Update:
    return Update({"a": np.array([0.0, value]).astype(dtype)}, weight)


FLOAT_LAYOUT = layout_of(one(0.0).arrays)
INT_LAYOUT = layout_of(one(0, dtype="int64").arrays)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nothing_of_a_non_finite_update_is_counted(bad: float) -> None:
    layout = {"a": ((2,), FLOAT), "b": ((2,), FLOAT)}
    total = ExactSum(layout, quantum_exponent=EXPONENT, capacity=3)
    fine = np.ones(2, np.float32)
    with pytest.raises(UpdateError, match=r"hospital.*'b'"):
        total.fold(Update({"a": fine, "b": np.array([bad, 0], np.float32)}), who="hospital")
    assert (total.count, total.total_weight) == (0, 0)
    assert not any(array.any() for array in total.sums().values())
    total.fold(Update({"a": fine, "b": fine}, 2))
    assert total.mean()["b"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38, -3e38, 2.0**30])
@pytest.mark.parametrize("place", [0, 700, 1299])
def test_a_refused_update_leaves_the_sum_as_it_was(bad: float, place: int) -> None:
    rng = np.random.default_rng(0)
    total = ExactSum({"a": ((1300,), FLOAT)}, quantum_exponent=-36, capacity=10)
    total.fold(Update({"a": rng.standard_normal(1300).astype(np.float32)}, 7))
    before = total.sums()["a"].copy()
    entries = (1e4 * rng.standard_normal(1300)).astype(np.float32)
    entries[place] = bad
    with pytest.raises(UpdateError):
        total.fold(Update({"a": entries}, 99))
    assert np.array_equal(total.sums()["a"], before)


@pytest.mark.parametrize("capacity", [1, 3, 1000])
def test_every_update_has_its_share_of_the_range_and_no_more(capacity: int) -> None:
    share = 2**HEADROOM_BITS // capacity
    total = ExactSum(INT_LAYOUT, quantum_exponent=0, capacity=capacity)
    for _ in range(min(capacity, 3)):
        total.fold(Update({"a": np.array([share - 1, 1 - share])}))
    assert total.sums()["a"].tolist() == [(share - 1) * min(capacity, 3), (1 - share) * min(capacity, 3)]
    for beyond in (share + 1, -share - 1, np.iinfo(np.int64).min):
        with pytest.raises(UpdateError, match="clip the update"):
            ExactSum(INT_LAYOUT, quantum_exponent=0, capacity=capacity).fold(
                Update({"a": np.array([0, beyond])})
            )


def test_a_float_that_overflows_the_range_is_refused() -> None:
    with pytest.raises(UpdateError, match="room for"):
        ExactSum(FLOAT_LAYOUT, quantum_exponent=-36, capacity=1000).fold(one(70.0, weight=1000))
    ExactSum(FLOAT_LAYOUT, quantum_exponent=-36, capacity=1000).fold(one(67.0, weight=1000))


@pytest.mark.parametrize("value", [0.0, 0.9 * 2.0**EXPONENT])
@pytest.mark.parametrize("weight", [2**62, 2**63, 2**64 - 1])
@pytest.mark.parametrize("dtype", ["float32", "int64"])
def test_a_weight_that_cannot_be_counted_is_refused(value: float, weight: int, dtype: str) -> None:
    """A weight comes from outside as an unsigned 64-bit number; with tiny entries it alone could wrap."""
    update = one(value, weight, dtype)
    total = ExactSum(layout_of(update.arrays), quantum_exponent=EXPONENT, capacity=4)
    with pytest.raises(UpdateError, match="weight"):
        total.fold(update)
    assert total.count == 0


@pytest.mark.parametrize("weight", [0, -1])
def test_weights_below_one_are_refused(weight: int) -> None:
    with pytest.raises(UpdateError, match=f"weight {weight} came"):
        folded(FLOAT_LAYOUT, [one(1.0, weight)])


def test_one_more_than_the_capacity_is_refused() -> None:
    total = folded(FLOAT_LAYOUT, [one(1.0), one(2.0)])
    with pytest.raises(UpdateError, match="complete"):
        total.fold(one(3.0))
    assert total.mean()["a"].tolist() == [0.0, 1.5]


def test_a_foreign_layout_is_refused() -> None:
    with pytest.raises(UpdateError, match="int64"):
        folded(FLOAT_LAYOUT, [one(1, dtype="int64")])


def test_an_empty_sum_has_no_mean() -> None:
    with pytest.raises(UpdateError, match="at least one"):
        ExactSum(FLOAT_LAYOUT, quantum_exponent=EXPONENT, capacity=1).mean()


def test_large_integers_stay_exact() -> None:
    """2**53 + 1 is no float64: a sum that went through floats would lose the last unit."""
    total = folded(INT_LAYOUT, [Update({"a": np.array([2**53 + 1, 0])}), one(0, dtype="int64")])
    assert total.sums()["a"][0] == 2**53 + 1


def test_floats_and_integers_are_not_summed_together() -> None:
    with pytest.raises(UpdateError, match="send one kind"):
        ExactSum({"a": ((1,), FLOAT), "b": ((1,), INT)}, quantum_exponent=EXPONENT, capacity=1)


def test_folding_returns_the_norm() -> None:
    update = Update({"a": np.array([3, 0], np.float32), "b": np.array([[4]], np.float32)}, 7)
    total = ExactSum(layout_of(update.arrays), quantum_exponent=EXPONENT, capacity=1)
    assert total.fold(update) == 5.0


def test_prepared_sums_meet_no_update_that_their_code_was_not_loaded_for() -> None:
    prepare_sums()
    loaded: Any = _add_quanta  # its type says nothing of numba's dispatcher
    known = len(loaded.signatures)
    arrays = {"a": np.ones((2, 3), np.float32)}
    exact = ExactSum(layout_of(arrays), quantum_exponent=-36, capacity=2)
    exact.fold(Update(arrays, 1))
    received = {"a": np.frombuffer(arrays["a"].tobytes(), np.float32).reshape(2, 3)}
    exact.fold(Update(received, 1))
    assert len(loaded.signatures) == known
