"""Selection against a full sort in Python."""

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.codec.topk import count_selected, find_cut, moments, top_k_indices, top_k_signs
from fedpeft.errors import UpdateError
from tests.codec.strategies import deltas


def sorted_choice(flat: list[float], count: int) -> list[int]:
    order = sorted(range(len(flat)), key=lambda i: (-abs(flat[i]), i))
    return sorted(order[:count])


@settings(deadline=None, max_examples=200)
@given(deltas, st.data())
def test_the_order_is_magnitude_descending_then_index_ascending(
    delta: npt.NDArray[np.float32], data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, delta.size))
    chosen = sorted_choice(delta.reshape(-1).tolist(), count)
    assert top_k_indices(delta, count).tolist() == chosen
    flat = np.ascontiguousarray(delta).reshape(-1)
    expected = [0] * delta.size
    for i in chosen:
        expected[i] = int(math.copysign(1, flat[i])) if flat[i] else 0
    assert top_k_signs(flat, find_cut(flat, count)).tolist() == expected


def test_a_large_tensor_with_every_magnitude_tied_keeps_the_first() -> None:
    delta = np.full(100_000, -0.25, dtype=np.float32)
    assert np.array_equal(top_k_indices(delta, 33_333), np.arange(33_333))


def test_a_large_random_tensor_matches_a_stable_sort() -> None:
    delta = np.random.default_rng(1).standard_normal(200_003).astype(np.float32)
    order = np.argsort(-np.abs(delta), kind="stable")
    for count in (1, 2_000, 100_000, 200_003):
        assert np.array_equal(top_k_indices(delta, count), np.sort(order[:count]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_values_that_are_not_finite_are_refused(bad: float, count: int) -> None:
    with pytest.raises(UpdateError, match="NaN or infinity"):
        top_k_indices(np.array([1.0, bad, 2.0], dtype=np.float32), count)


def test_wrong_requests_are_refused() -> None:
    delta = np.ones(3, dtype=np.float32)
    with pytest.raises(UpdateError, match="top-k of 4"):
        top_k_indices(delta, 4)
    with pytest.raises(UpdateError, match="float64"):
        top_k_indices(delta.astype(np.float64), 1)
    with pytest.raises(UpdateError, match=r"density 1\.5"):
        count_selected(3, 1.5)


@pytest.mark.parametrize(
    ("size", "density", "count"),
    [(30, 0.1, 3), (8, 0.05, 1), (8, 0.0, 0), (0, 0.5, 0), (7, 1.0, 7), (10, 0.25, 3), (1000, 0.05, 50)],
)
def test_counts(size: int, density: float, count: int) -> None:
    assert count_selected(size, density) == count


@settings(deadline=None)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=50), st.sampled_from([0.0, 1e3, -3e7]))
def test_moments_match_exact_fractions(values: list[float], shift: float) -> None:
    flat = np.array(values, dtype=np.float32) + np.float32(shift)
    exact = [Fraction(float(value)) for value in flat]
    mean = sum(exact, Fraction(0)) / len(exact)
    variance = sum(((value - mean) ** 2 for value in exact), Fraction(0)) / len(exact)
    found = moments(flat)
    assert found.mean == pytest.approx(float(mean), rel=1e-12, abs=1e-9)
    assert found.std == pytest.approx(math.sqrt(variance), rel=1e-6, abs=1e-9)
    assert found.rms == pytest.approx(math.sqrt(variance + mean**2), rel=1e-12, abs=1e-9)


def test_the_deviation_of_a_constant_tensor_is_exactly_zero() -> None:
    assert moments(np.full(12_345, 0.1, dtype=np.float32)).std == 0.0
