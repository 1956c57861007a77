"""Who is asked: exact sizes, and chances at a stated false-alarm rate."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.config.sampling import cohort_size, sample_cohort
from fedpeft.config.sections import SamplingSection
from fedpeft.errors import FederationError
from fedpeft.runtime.randomness import stream

NAMES = [f"client-{index:03d}" for index in range(40)]
SIGMAS = 6.0  # of a normal: a correct sampler fails one such check in 5e8 seeds


def test_all_asks_everyone_who_is_there() -> None:
    section = SamplingSection(kind="all")
    assert cohort_size(section, 40) == 40
    assert sample_cohort(section, list(reversed(NAMES[:7])), 40, stream(0, "t")) == NAMES[:7]


@pytest.mark.parametrize(
    ("fraction", "clients", "size"), [(0.1, 40, 4), (0.01, 40, 1), (1.0, 40, 40), (0.26, 10, 3)]
)
def test_a_fraction_is_of_all_clients(fraction: float, clients: int, size: int) -> None:
    section = SamplingSection(kind="fraction", fraction=fraction)
    assert cohort_size(section, clients) == size
    assert len(sample_cohort(section, NAMES[:clients], clients, stream(1, "t"))) == size


@given(st.integers(1, 40), st.integers(0, 40), st.floats(0, 2), st.integers(0, 2**32))
def test_a_fixed_cohort_has_its_exact_size(cohort: int, present: int, extra: float, seed: int) -> None:
    section = SamplingSection(kind="fixed", cohort=cohort)
    chosen = sample_cohort(section, NAMES[:present], 40, stream(seed, "t"), extra)
    assert len(chosen) == min(present, math.ceil(cohort * (1 + extra)))
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(NAMES[:present])


def test_a_fixed_cohort_beyond_the_clients_is_refused() -> None:
    with pytest.raises(FederationError, match=r"is 5 and there are 3 clients.*bring 2 more"):
        cohort_size(SamplingSection(kind="fixed", cohort=5), 3)


def test_the_order_of_arrival_does_not_matter() -> None:
    for section in (SamplingSection(kind="fixed", cohort=9), SamplingSection(kind="poisson", rate=0.4)):
        there, back = (sample_cohort(section, names, 40, stream(2, "t")) for names in (NAMES, NAMES[::-1]))
        assert there == back


def test_every_client_is_equally_likely_in_a_fixed_cohort() -> None:
    rounds, share = 4000, 10 / 40
    section = SamplingSection(kind="fixed", cohort=10)
    drawn = [
        name for round_ in range(rounds) for name in sample_cohort(section, NAMES, 40, stream(5, "t", round_))
    ]
    counts = np.array([drawn.count(name) for name in NAMES])
    assert np.all(np.abs(counts - rounds * share) < SIGMAS * math.sqrt(rounds * share * (1 - share)))


def test_poisson_tosses_one_coin_per_client() -> None:
    """Mean and variance of the cohort size are the binomial's; both bounds are `SIGMAS` wide."""
    rounds, rate = 4000, 0.3
    section = SamplingSection(kind="poisson", rate=rate)
    sizes = np.array(
        [len(sample_cohort(section, NAMES, 40, stream(6, "t", round_), 0.5)) for round_ in range(rounds)]
    )
    variance = 40 * rate * (1 - rate)
    assert abs(sizes.mean() - 40 * rate) < SIGMAS * math.sqrt(variance / rounds)
    assert abs(sizes.var() - variance) < SIGMAS * variance * math.sqrt(2 / rounds)
    assert cohort_size(section, 40) == 12


def test_poisson_may_ask_nobody() -> None:
    section = SamplingSection(kind="poisson", rate=1e-9)
    assert sample_cohort(section, NAMES, 40, stream(0, "t")) == []
    assert cohort_size(section, 40) == 1
