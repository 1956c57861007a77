"""One rounding per weight, against exact rational arithmetic."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from fedpeft.errors import ModelError
from fedpeft.seedspace.rounding import combine

# Significand bits and the exponent of the smallest subnormal.
FORMATS = {
    torch.float64: (53, -1074),
    torch.float32: (24, -149),
    torch.bfloat16: (8, -133),
    torch.float16: (11, -24),
}


def nearest(value: Fraction, bits: int, smallest: int) -> Fraction:
    """`value` rounded once to a binary format, ties to even."""
    if not value:
        return value
    magnitude = abs(value)
    top = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** top > magnitude:
        top -= 1
    unit = Fraction(2) ** max(top - bits + 1, smallest)
    return round(value / unit) * unit  # Python rounds fractions to even


@pytest.mark.parametrize("dtype", FORMATS)
@settings(deadline=None)
@given(
    st.floats(width=16, allow_nan=False, allow_infinity=False),
    st.integers(-30, 12),
    st.integers(-(2**53) + 1, 2**53 - 1),
    st.integers(-70, -38),
)
@example(1.0, 0, 2**51 + 1, -51 - 24)  # just above a float32 tie, hidden below float64's last bit
@example(1.0, -20, 2**44 + 1, -63)
@example(1.0, 0, 1, -9)  # a bfloat16 tie
@example(0.0, 0, 1, -150)  # a float32 tie between zero and the smallest subnormal
def test_combine_rounds_once(
    dtype: torch.dtype, significand: float, shift: int, amount: int, exponent: int
) -> None:
    base = torch.tensor([math.ldexp(significand, shift)], dtype=torch.float64).to(dtype)
    assume(bool(base.isfinite()))  # a weight beyond its own format is none
    exact = Fraction(float(base)) + Fraction(amount) * Fraction(2) ** exponent
    expected = nearest(exact, *FORMATS[dtype])
    got = combine(base, torch.tensor([amount]), exponent)
    assert got.dtype == dtype
    if abs(expected) <= Fraction(torch.finfo(dtype).max):
        assert Fraction(float(got)) == expected
    else:
        assert math.isinf(float(got))


def test_rounding_twice_would_differ() -> None:
    """A hard case exists: through float64 alone the tie goes to even, and the weight is another."""
    base, amount, exponent = torch.tensor([2.0**-30]), 2**30 + 2**6, -30
    exact = Fraction(float(base)) + Fraction(amount) * Fraction(2) ** exponent
    assert Fraction(float(combine(base, torch.tensor([amount]), exponent))) == nearest(exact, 24, -149)
    small, sums = torch.tensor([2.0**-80]), torch.tensor([2**30 + 2**6])
    twice = (small.double() + sums.double() * 2.0**-30).float()
    assert not combine(small, sums, -30).equal(twice)


def test_tensors_keep_shape_and_special_values() -> None:
    base = torch.tensor([[float("inf"), float("-inf")], [float("nan"), -0.0]])
    got = combine(base, torch.tensor([[3, 5], [7, 0]]), -3)
    assert got[0].equal(base[0])
    assert got[1].isnan().tolist() == [True, False]
    assert float(got[1, 1]) == 0.0


def test_integer_weights_are_refused() -> None:
    with pytest.raises(ModelError, match="floating-point"):
        combine(torch.tensor([1]), torch.tensor([1]), 0)
