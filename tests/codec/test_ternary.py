"""Ternarising: scales against their definitions, and the cases that would lose a tensor in silence."""

import doctest

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedpeft.codec.ternary
from fedpeft.codec import FixedScale, LeastSquaresScale, StdScale, TernaryTensor, rescale, ternarise
from fedpeft.codec.topk import count_selected
from fedpeft.errors import UpdateError
from tests.codec.strategies import densities, shapes


@settings(deadline=None)
@given(shapes, densities, st.integers(0, 2**32))
def test_scale_is_alpha_times_the_deviation_of_the_whole_delta(
    shape: tuple[int, ...], density: float, seed: int
) -> None:
    delta = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    ternary = ternarise(delta, density, StdScale(alpha=2.0))
    assert ternary.shape == delta.shape
    assert np.count_nonzero(ternary.trits) == count_selected(delta.size, density)
    if delta.size > 1:
        # Over all entries, kept or not.
        assert ternary.scale == pytest.approx(2.0 * float(delta.astype(np.float64).std()), rel=1e-6)
    assert np.array_equal(ternary.dense(), ternary.trits * np.float32(ternary.scale))


def test_the_sample_in_the_docstring_runs() -> None:
    found = doctest.testmod(fedpeft.codec.ternary)
    assert found.attempted == 3
    assert found.failed == 0


def test_least_squares_scale_cannot_be_bettered() -> None:
    delta = np.random.default_rng(3).standard_normal((17, 5)).astype(np.float32)
    best = ternarise(delta, 0.3, LeastSquaresScale())
    loss = float(np.sum((delta - best.dense()) ** 2))
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert float(np.sum((delta - rescale(best, factor).dense()) ** 2)) > loss


@pytest.mark.parametrize("value", [0.5, -2.0])
@pytest.mark.parametrize("shape", [(), (1,), (4, 3)])
def test_a_constant_tensor_is_not_lost_to_its_zero_deviation(shape: tuple[int, ...], value: float) -> None:
    delta = np.full(shape, value, dtype=np.float32)
    assert np.array_equal(ternarise(delta, 1.0, StdScale()).dense(), delta)


def test_an_all_zero_tensor_stays_zero_and_keeps_no_sign() -> None:
    ternary = ternarise(np.zeros((3, 4), dtype=np.float32), 0.5, StdScale())
    assert not ternary.trits.any()
    assert not ternary.dense().any()


def test_per_tensor_cuts_keep_the_small_factor() -> None:
    # One cut at 5% over both would take every entry from the larger factor.
    rng = np.random.default_rng(5)
    large = rng.standard_normal((8, 64)).astype(np.float32)
    small = (rng.standard_normal((64, 8)) * 1e-4).astype(np.float32)
    joint = np.concatenate([np.abs(large).ravel(), np.abs(small).ravel()])
    assert np.sort(joint)[-51] > np.abs(small).max()
    for delta in (large, small):
        assert np.count_nonzero(ternarise(delta, 0.05, StdScale()).trits) == 26


def test_the_result_is_frozen_and_the_input_is_not() -> None:
    trits = np.array([1, 0, -1], dtype=np.int8)
    ternary = TernaryTensor(trits, 1.0)
    with pytest.raises(ValueError, match="read-only"):
        ternary.trits[0] = 0
    trits[0] = 0
    assert ternarise(np.ones(2, dtype=np.float32), 1.0, FixedScale(0.25)).dense().tolist() == [0.25, 0.25]


@pytest.mark.parametrize("scale", [-1.0, np.nan, np.inf, 1e39])
def test_impossible_scales_are_refused(scale: float) -> None:
    with pytest.raises(UpdateError, match="scale"):
        TernaryTensor(np.zeros(2, dtype=np.int8), scale)


def test_impossible_trits_are_refused() -> None:
    for bad in (np.array([2], dtype=np.int8), np.array([-2], dtype=np.int8), np.array([1], dtype=np.int16)):
        trits: npt.NDArray[np.int8] = bad  # type: ignore[assignment]  # the wrong dtype is the point
        with pytest.raises(UpdateError, match="ternary entries"):
            TernaryTensor(trits, 1.0)
