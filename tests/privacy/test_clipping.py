"""Clipping: never above the bound, zero stays zero, and the adaptive bound follows the quantile."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedpeft.errors import PrivacyError, UpdateError
from fedpeft.privacy.clipping import AdaptiveClipping, clip
from fedpeft.privacy.noise import SeededNoise
from fedpeft.runtime.randomness import stream
from fedpeft.updates.update import Update


def length(update: Update) -> float:
    """Independent of the code: exact integers or `math.hypot`."""
    return math.hypot(*(float(x) for array in update.arrays.values() for x in array.reshape(-1)))


@settings(deadline=None)
@given(
    values=arrays(np.float32, 12, elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    bound=st.floats(1e-6, 1e6),
)
def test_floats_end_within_the_bound_and_keep_their_direction(values: np.ndarray, bound: float) -> None:
    update = Update({"a": values[:8].reshape(2, 4), "b": values[8:]}, weight=3)
    clipped = clip(update, bound)
    norm = length(update)
    assert length(clipped.update) <= bound
    assert clipped.within is (norm <= bound)
    assert clipped.update.weight == 3
    if norm <= bound:
        assert all(np.array_equal(clipped.update.arrays[n], update.arrays[n]) for n in update)
    else:
        flat = np.concatenate([clipped.update.arrays[n].reshape(-1) for n in ("a", "b")]).astype(float)
        assert length(clipped.update) >= bound * (1 - 1e-5)
        np.testing.assert_allclose(flat, values.astype(float) * bound / norm, rtol=1e-5, atol=1e-37)


@settings(deadline=None)
@given(values=arrays(np.int64, 16, elements=st.integers(-(2**40), 2**40)), bound=st.integers(1, 2**45))
def test_whole_numbers_stay_whole_and_within(values: np.ndarray, bound: int) -> None:
    clipped = clip(Update({"scalars": values}), float(bound)).update.arrays["scalars"]
    assert clipped.dtype == np.int64
    assert sum(int(x) ** 2 for x in clipped) <= bound**2
    assert all(
        abs(int(new)) <= abs(int(old)) and int(new) * int(old) >= 0
        for new, old in zip(clipped, values, strict=True)
    )


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_zero_stays_zero_and_is_within(dtype: type) -> None:
    clipped = clip(Update({"a": np.zeros(5, dtype=dtype)}), 0.1)
    assert clipped.within
    assert not clipped.update.arrays["a"].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(UpdateError, match="counts as zero"):
        clip(Update({"a": np.array([1.0, bad], dtype=np.float32)}), 1.0)


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, math.nan])
def test_a_bound_must_bound(bound: float) -> None:
    with pytest.raises(PrivacyError, match="clip_norm"):
        clip(Update({"a": np.ones(2, dtype=np.float32)}), bound)
    with pytest.raises(PrivacyError, match="clip_norm"):
        AdaptiveClipping(clip_norm=bound, count_std=1.0)


def test_z_delta_by_hand() -> None:
    """z = 1, sigma_b = 5: 1 / sqrt(1 - 1/100)."""
    clipping = AdaptiveClipping(clip_norm=0.1, count_std=5.0)
    assert clipping.update_multiplier(1.0) == pytest.approx(1.0 / math.sqrt(0.99), rel=1e-12)
    for multiplier in (10.0, 11.0, 0.0):
        with pytest.raises(PrivacyError, match="below twice count_std"):
            clipping.update_multiplier(multiplier)


def test_the_sign_of_a_step() -> None:
    clipping = AdaptiveClipping(clip_norm=1.0, count_std=5.0)
    assert clipping.next(1.0).clip_norm == pytest.approx(math.exp(-0.1))  # all within: too wide
    assert clipping.next(0.0).clip_norm == pytest.approx(math.exp(0.1))  # none within: too tight
    assert clipping.next(0.5).clip_norm == 1.0


@pytest.mark.parametrize("start", [1e-3, 50.0])
@pytest.mark.parametrize("quantile", [0.25, 0.5, 0.8])
def test_the_bound_converges_to_the_quantile(start: float, quantile: float) -> None:
    """From far below and far above, with noise on the bits; norms are lognormal with median 1."""
    rng, source = stream(3, "norms"), SeededNoise(stream(3, "bits"))
    clipping = AdaptiveClipping(clip_norm=start, count_std=5.0, quantile=quantile)
    bounds = []
    for _ in range(400):
        norms = np.exp(0.5 * rng.normal(size=100))
        within = {str(i): bool(norm <= clipping.clip_norm) for i, norm in enumerate(norms)}
        clipping = clipping.next(clipping.noisy_fraction(within, 100.0, source))
        bounds.append(clipping.clip_norm)
    target = math.exp(0.5 * {0.25: -0.6745, 0.5: 0.0, 0.8: 0.8416}[quantile])
    assert float(np.exp(np.mean(np.log(bounds[-150:])))) == pytest.approx(target, rel=0.06)


def test_the_released_share_is_centred_and_noised_as_promised() -> None:
    source, clipping = SeededNoise(stream(4, "share")), AdaptiveClipping(clip_norm=1.0, count_std=4.0)
    within = {"a": True, "b": True, "c": False, "d": True}
    shares = np.array([clipping.noisy_fraction(within, 4.0, source) for _ in range(4000)])
    # noise of the count is 4, of the share 4 / 4
    assert abs(shares.mean() - 0.75) < 5 / math.sqrt(4000)
    assert abs(shares.std() - 1.0) < 5 / math.sqrt(2 * 4000)
    empty = np.array([clipping.noisy_fraction({}, 4.0, source) for _ in range(4000)])
    assert abs(empty.mean() - 0.5) < 5 / math.sqrt(4000)


@pytest.mark.parametrize(
    "change", [{"quantile": 0.0}, {"quantile": 1.0}, {"learning_rate": 0.0}, {"count_std": 0.0}]
)
def test_impossible_settings_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(PrivacyError):
        AdaptiveClipping(**({"clip_norm": 1.0, "count_std": 1.0} | change))
