"""Noise: exact coins, the discrete Gaussian's distribution, and which source may be used where.

Statistical tests share one false-alarm rate, `FALSE_ALARM` for the whole file, split evenly (Bonferroni).
With seeded words a test that passed passes always; only the one on the system's words is drawn anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction

import mpmath  # type: ignore[import-untyped]  # ships no types
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom, chisquare, kstest, norm  # type: ignore[import-untyped]  # scipy ships no types

from fedpeft.errors import PrivacyError
from fedpeft.privacy.bernoulli import bernoulli_exp, exp_bounds, settle
from fedpeft.privacy.discrete_gaussian import discrete_gaussian
from fedpeft.privacy.noise import NoiseSource, SeededNoise, SystemNoise, coins, require_secure
from fedpeft.runtime.randomness import stream

FALSE_ALARM = 1e-6
TESTS = 24  # 6 laws, 9 for wide noise, 2 on the system's words, 6 kinds of coins, 1 spare
LEVEL = FALSE_ALARM / TESTS
SIZE = 200_000


def seeded(name: str) -> SeededNoise:
    return SeededNoise(stream(7, "noise tests", name))


@dataclass
class Script:
    """Words that a test chose."""

    script: list[int]
    asked: int = field(default=0)

    def words(self, count: int) -> NDArray[np.uint64]:
        self.asked += count
        return np.array([self.script.pop(0) for _ in range(count)], dtype=np.uint64)


def fits(sample: NDArray[np.int64], sigma: float) -> float:
    """The chi-square test's p-value for the discrete Gaussian, tails pooled to 20 expected counts."""
    reach = max(1, int(sigma * 12))
    grid = np.arange(-reach, reach + 1)
    weight = np.exp(-(grid.astype(float) ** 2) / (2 * sigma**2))
    expected = weight / weight.sum() * len(sample)
    kept = expected >= 20
    counts = np.array([(sample == x).sum() for x in grid[kept]], dtype=float)
    observed = np.append(counts, len(sample) - counts.sum())
    wanted = np.append(expected[kept], len(sample) - expected[kept].sum())
    if wanted[-1] < 5:
        observed[-2], wanted[-2] = observed[-2:].sum(), wanted[-2:].sum()
        observed, wanted = observed[:-1], wanted[:-1]
    return float(chisquare(observed, wanted).pvalue)


@pytest.mark.parametrize("sigma", [0.4, 1.0, 1.5, 2.9, 6.0, 20.0])
def test_discrete_gaussian_fits_its_law(sigma: float) -> None:
    assert fits(discrete_gaussian(seeded(f"{sigma}"), sigma, SIZE), sigma) > LEVEL


def test_the_test_of_the_law_can_fail() -> None:
    """A sigma that is off by 2%, and a continuous Gaussian rounded to integers, are found out."""
    assert fits(discrete_gaussian(seeded("off"), 1.53, SIZE), 1.5) < LEVEL
    rounded = np.rint(stream(1, "rounded").normal(0, 0.4, SIZE)).astype(np.int64)
    assert fits(rounded, 0.4) < LEVEL


@pytest.mark.parametrize("exponent", [10, 30, 52])
def test_wide_noise_is_normal(exponent: int) -> None:
    sigma = 0.9 * 2.0**exponent
    sample = discrete_gaussian(seeded(f"wide {exponent}"), sigma, SIZE)
    # The lattice moves the distribution function by less than one atom, 0.4 / sigma, against 1 / sqrt(SIZE).
    assert kstest((sample + stream(2, "dither").random(SIZE) - 0.5) / sigma, norm.cdf).pvalue > LEVEL
    assert abs(sample.var() / sigma**2 - 1) < norm.isf(LEVEL / 2) * math.sqrt(2 / SIZE)
    low = sample & 1023  # the lowest bits are uniform, not multiples of some coarser grid
    if exponent > 20:
        assert chisquare(np.bincount(low, minlength=1024)).pvalue > LEVEL


def test_the_system_source_too_and_coordinates_are_independent() -> None:
    sample = discrete_gaussian(SystemNoise(), 3.0, SIZE)
    assert fits(sample, 3.0) > LEVEL
    for lag in (1, 2, SIZE // 2):
        product = float((sample[:-lag] * sample[lag:]).mean()) / 9.0
        assert abs(product) < norm.isf(LEVEL / 6) / math.sqrt(SIZE - lag)


def test_it_is_fast_enough_for_a_million_coordinates() -> None:
    """No clock: words asked for are what takes the time, 14 per coordinate at most."""
    inner, counter = seeded("count"), [0]

    class Counting:
        def words(self, count: int) -> NDArray[np.uint64]:
            counter[0] += count
            return inner.words(count)

    discrete_gaussian(Counting(), 2.0**36, 1_000_000)
    assert counter[0] < 14_000_000


def test_sizes_and_repeatability() -> None:
    assert discrete_gaussian(seeded("x"), 2.0, 0).shape == (0,)
    for size in (1, 2, 65_537):
        sample = discrete_gaussian(seeded("x"), 2.0, size)
        assert (sample.shape, sample.dtype) == ((size,), np.dtype(np.int64))
    first = discrete_gaussian(seeded("x"), 2.0, 100)
    assert np.array_equal(first, discrete_gaussian(seeded("x"), 2.0, 100))
    assert not np.array_equal(first, discrete_gaussian(seeded("y"), 2.0, 100))
    drawn = [discrete_gaussian(SystemNoise(), 2.0**30, 4).tolist() for _ in range(2)]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("sigma", [0.0, -1.0, 2.0**-7, 2.0**53, float("nan"), float("inf")])
def test_impossible_widths_are_refused(sigma: float) -> None:
    with pytest.raises(PrivacyError, match="quanta"):
        discrete_gaussian(seeded("x"), sigma, 1)


@pytest.mark.parametrize("gamma", [0.0, 1e-9, 0.3, 1.0, 7.0])
def test_coins_of_exponential_probability(gamma: float) -> None:
    heads = int(bernoulli_exp(seeded(f"coin {gamma}"), np.full(SIZE, gamma), lambda _: Fraction(gamma)).sum())
    p = math.exp(-gamma)
    low, high = binom.ppf([LEVEL / 2, 1 - LEVEL / 2], SIZE, p)
    assert low <= heads <= high


@pytest.mark.parametrize(
    "gamma", [Fraction(0), Fraction(1, 3), Fraction(1), Fraction(45), Fraction(10**7, 3)]
)
@pytest.mark.parametrize("precision", [64, 128, 1024])
def test_bounds_enclose_the_exponential(gamma: Fraction, precision: int) -> None:
    low, high = exp_bounds(gamma, precision)
    with mpmath.workprec(2 * precision + 200):
        true = mpmath.exp(-mpmath.mpf(gamma.numerator) / gamma.denominator) * mpmath.mpf(2) ** precision
        assert low <= true <= high
    assert high - low <= 3


def test_a_coin_too_close_to_call_draws_further_words() -> None:
    """U agrees with exp(-1) in its first 64 bits; the next word decides."""
    with mpmath.workprec(400):
        bits = int(mpmath.floor(mpmath.exp(-1) * mpmath.mpf(2) ** 128))
    first, second = bits >> 64, bits & (2**64 - 1)
    for script, expected in (([second - 5], True), ([second + 5], False)):
        source = Script(script)
        assert settle(source, first, Fraction(1)) is expected
        assert source.asked == 1
    undecided = Script([second, 0])
    assert settle(undecided, first, Fraction(1)) is True  # and once more when even those agree
    assert undecided.asked == 2
    assert settle(Script([]), first - 9, Fraction(1)) is True
    assert settle(Script([]), first + 9, Fraction(1)) is False


def test_close_coins_are_settled_exactly_inside_the_vectorised_path() -> None:
    """The float gamma is off by more than the words differ; only the exact one decides."""
    with mpmath.workprec(400):
        first = int(mpmath.floor(mpmath.exp(-1) * mpmath.mpf(2) ** 64))
    words = [first - 9, first + 9]
    wrong = np.array([1.0 + 2e-13, 1.0 - 2e-13])
    assert bernoulli_exp(Script(words), wrong, lambda _: Fraction(1)).tolist() == [True, False]


def test_sampling_coins() -> None:
    assert coins(seeded("all"), 1.0, 1000).all()
    assert not coins(seeded("none"), 0.0, 1000).any()
    heads = int(coins(seeded("some"), 0.3, SIZE).sum())
    low, high = binom.ppf([LEVEL / 2, 1 - LEVEL / 2], SIZE, 0.3)
    assert low <= heads <= high
    edge = math.floor(math.ldexp(0.3, 64))
    assert coins(Script([edge - 1, edge]), 0.3, 2).tolist() == [True, False]
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(PrivacyError, match="sample rate"):
            coins(seeded("x"), rate, 1)


class Disguised(SystemNoise):
    """A subclass may do anything, so it is not the system's source."""


@pytest.mark.parametrize("source", [seeded("x"), Script([]), Disguised()])
def test_only_the_system_source_is_secure(source: NoiseSource) -> None:
    with pytest.raises(PrivacyError, match="not a simulation"):
        require_secure(source)
    assert require_secure(SystemNoise()) == SystemNoise()
