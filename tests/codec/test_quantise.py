"""Stochastic quantisation: unbiased, within one level, and packed as described."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.codec import default_channel_axis, quantise, sign_with_scale
from fedpeft.codec.quantise import pack_codes, unpack_codes
from fedpeft.errors import UpdateError


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from([2, 4, 8]),
    st.sampled_from([(), (1,), (0, 3), (3, 40), (40, 3), (2, 3, 4)]),
    st.integers(0, 2**32),
    st.sampled_from([1e-38, 1e-3, 1.0, 1e38]),
)
def test_each_entry_moves_to_a_neighbouring_level(
    bits: int, shape: tuple[int, ...], seed: int, size: float
) -> None:
    rng = np.random.default_rng(seed)
    delta = (rng.uniform(-1, 1, shape) * size).astype(np.float32)
    axis = default_channel_axis(shape)
    quantised = quantise(delta, bits, rng, axis)
    levels = 2 ** (bits - 1) - 1
    others = tuple(i for i in range(delta.ndim) if i != axis)
    step = np.abs(delta.astype(np.float64)).max(axis=others, keepdims=True, initial=0.0) / levels
    error = np.abs(quantised.dense().astype(np.float64) - delta)
    assert np.all(error <= step * (1 + 1e-5) + 1e-44)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_mean_over_draws_is_the_delta(bits: int) -> None:
    rng = np.random.default_rng(bits)
    delta = rng.standard_normal((4, 30)).astype(np.float32)
    runs = 4000
    total = sum(quantise(delta, bits, rng, 0).dense().astype(np.float64) for _ in range(runs))
    step = np.abs(delta).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
    # A Bernoulli's deviation is at most step / 2; 5.5 sigma over 120 entries: false alarm below 1e-5.
    assert np.all(np.abs(total / runs - delta) <= 5.5 * step / 2 / np.sqrt(runs))


def test_levels_are_kept_exactly() -> None:
    delta = np.array([[-7, 0, 3, 7], [0, 0, 0, 0]], dtype=np.float32)
    quantised = quantise(delta, 4, np.random.default_rng(0), 0)
    assert np.array_equal(quantised.dense(), delta)
    assert quantised.scales.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("shape", "axis"), [((), None), ((5,), None), ((8, 384), 0), ((384, 8), 1), ((4, 4), 0), ((9, 2, 2), 0)]
)
def test_channels_lie_along_the_short_axis(shape: tuple[int, ...], axis: int | None) -> None:
    assert default_channel_axis(shape) == axis


@settings(deadline=None)
@given(st.sampled_from([2, 4, 8]), st.data())
def test_packing_is_the_described_integer(bits: int, data: st.DataObject) -> None:
    largest = 2 ** (bits - 1) - 1
    codes = data.draw(st.lists(st.integers(-largest, largest), max_size=20))
    packed = pack_codes(np.array(codes, dtype=np.int8), bits)
    expected = sum((code % 2**bits) << (bits * i) for i, code in enumerate(codes))
    assert int.from_bytes(packed, "little") == expected
    assert len(packed) == -(-len(codes) * bits // 8)
    assert unpack_codes(packed, bits, len(codes)).tolist() == codes


def test_packed_codes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UpdateError, match="3 are needed"):
        unpack_codes(b"\0\0", 4, 5)
    with pytest.raises(UpdateError, match="must be zero"):
        unpack_codes(b"\x00\x10", 4, 3)


def test_wrong_requests_are_refused() -> None:
    rng, ones = np.random.default_rng(0), np.ones((2, 2), dtype=np.float32)
    with pytest.raises(UpdateError, match="2, 4 or 8"):
        quantise(ones, 3, rng, None)
    with pytest.raises(UpdateError, match="channel axis 2"):
        quantise(ones, 4, rng, 2)
    with pytest.raises(UpdateError, match="NaN"):
        quantise(np.array([np.nan], dtype=np.float32), 4, rng, None)


def test_sign_scale_is_the_mean_magnitude_and_zero_counts_as_positive() -> None:
    dense = sign_with_scale(np.array([[3.0, -1.0], [0.0, -4.0]], dtype=np.float32)).dense()
    assert dense.tolist() == [[2.0, -2.0], [2.0, -2.0]]
    assert sign_with_scale(np.zeros((0, 3), dtype=np.float32)).dense().shape == (0, 3)
    assert not sign_with_scale(np.zeros(5, dtype=np.float32)).dense().any()
