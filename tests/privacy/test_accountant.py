"""The accountant against published values, quadrature, sums over the lattice, and two other accountants."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.integrate import quad  # type: ignore[import-untyped]  # scipy ships no types
from scipy.stats import norm  # type: ignore[import-untyped]  # scipy ships no types

from fedpeft.errors import PrivacyError
from fedpeft.privacy.accountant import (
    MULTIPLIER_STEP,
    ORDERS,
    _curve,
    epsilon,
    noise_multiplier_for,
    tighter_epsilon,
)
from fedpeft.privacy.events import ClientLevel, Event, Local, RecordLevel

# (sample rate, noise multiplier, steps, delta, epsilon at orders 2 to 255)
REFERENCE = [
    (0.01, 1.0, 1000, 1e-5, 2.108),
    (0.01, 1.0, 10000, 1e-5, 6.719),
    (0.064, 4.0, 1000, 1e-5, 2.269),
    (0.1, 1.0, 100, 1e-6, 9.124),
    (1.0, 5.0, 100, 1e-6, 11.855),
]
reference = pytest.mark.parametrize(("q", "z", "steps", "delta", "expected"), REFERENCE)


def steps_of(q: float, z: float, steps: int) -> list[Event]:
    return [RecordLevel(noise_multiplier=z, sample_rate=q, steps=steps)]


@reference
def test_reference_values(q: float, z: float, steps: int, delta: float, expected: float) -> None:
    assert epsilon(steps_of(q, z, steps), delta) == pytest.approx(expected, abs=6e-4)


@reference
def test_a_privacy_loss_distribution_is_at_most_that(
    q: float, z: float, steps: int, delta: float, expected: float
) -> None:
    other = tighter_epsilon(steps_of(q, z, steps), delta)
    assert 0.85 * expected < other <= expected


@pytest.mark.filterwarnings("ignore:Optimal order")  # of its own first guess
@pytest.mark.filterwarnings("ignore:divide by zero")  # at sample rate 1
@reference
def test_opacus_prv_is_at_most_that(q: float, z: float, steps: int, delta: float, expected: float) -> None:
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(z, q, steps)]
    assert 0.85 * expected < accountant.get_epsilon(delta) <= expected


def mixture_moments(q: float, z: float, order: int) -> tuple[float, float]:
    """Rényi divergences of N(0, z^2) and its mixture with N(1, z^2), both ways, by quadrature."""

    def log_ratio(x: float) -> float:
        return math.log1p(-q + q * math.exp((2 * x - 1) / (2 * z * z)))

    def moment(sign: int) -> float:
        def integrand(x: float) -> float:
            power = order if sign > 0 else 1 - order
            return math.exp(power * log_ratio(x) + float(norm.logpdf(x, scale=z)))

        peak = order if sign > 0 else 0
        parts = [
            quad(integrand, a, a + z, epsabs=0, epsrel=1e-10)[0] for a in np.arange(-12 * z, peak + 12 * z, z)
        ]
        return math.log(math.fsum(parts)) / (order - 1)

    return moment(+1), moment(-1)


@pytest.mark.parametrize(("q", "z"), [(0.01, 1.0), (0.2, 2.0), (0.5, 1.0)])
def test_rényi_curve_against_quadrature(q: float, z: float) -> None:
    for order in (2, 3, 8):
        removing, adding = mixture_moments(q, z, order)
        ours = float(_curve(z, q)[ORDERS.index(order)])
        assert ours == pytest.approx(removing, rel=1e-8)
        assert adding <= ours * (1 + 1e-9)


def lattice_pmf(sigma: float, shift: tuple[int, ...], reach: int) -> NDArray[np.float64]:
    """Discrete Gaussian around `shift` on the square [-reach, reach]^2."""
    grid = np.arange(-reach, reach + 1)
    one = [np.exp(-((grid - s) ** 2) / (2 * sigma**2)) for s in shift]
    table = np.multiply.outer(one[0], one[1])
    total: NDArray[np.float64] = table / np.exp(-(grid**2) / (2 * sigma**2)).sum() ** 2
    return total


@pytest.mark.parametrize("shift", [(2, 0), (1, 1), (2, -1)])
@pytest.mark.parametrize("q", [0.1, 0.7])
def test_the_curve_is_exact_for_discrete_noise(shift: tuple[int, int], q: float) -> None:
    """In two dimensions, sampled, by summing over the lattice; sigma of the order of one quantum."""
    sigma, length = 1.3, math.hypot(*shift)
    base, moved = lattice_pmf(sigma, (0, 0), 60), lattice_pmf(sigma, shift, 60)
    mixed = (1 - q) * base + q * moved
    for order in (2, 3, 5):
        where = base > 1e-280
        ratio = mixed[where] / base[where]
        removing = math.log((base[where] * ratio**order).sum()) / (order - 1)
        adding = math.log((mixed[where] * ratio ** (-order)).sum()) / (order - 1)
        ours = float(_curve(sigma / length, q)[ORDERS.index(order)])
        assert ours == pytest.approx(removing, rel=1e-9)
        assert adding <= ours * (1 + 1e-9)


def delta_by_quadrature(q: float, z: float, epsilon_: float) -> float:
    """The exact delta of one sampled Gaussian release at `epsilon_`, the worse of both directions."""
    share = math.exp(epsilon_)

    def excess(x: float, up: bool) -> float:
        base, mixed = norm.pdf(x, scale=z), (1 - q) * norm.pdf(x, scale=z) + q * norm.pdf(x, 1.0, z)
        return float(max(0.0, mixed - share * base if up else base - share * mixed))

    edges = np.arange(-15 * z, 15 * z + 1, z / 2)
    return max(
        math.fsum(quad(excess, a, a + z / 2, args=(up,), epsabs=1e-14)[0] for a in edges)
        for up in (True, False)
    )


@pytest.mark.parametrize(("q", "z"), [(1.0, 1.0), (1.0, 4.0), (0.1, 0.8)])
@pytest.mark.parametrize("delta", [1e-3, 1e-6])
def test_one_release_keeps_its_promise_and_not_by_far_too_much(q: float, z: float, delta: float) -> None:
    claimed = epsilon([ClientLevel(noise_multiplier=z, sample_rate=q)], delta)
    assert 1e-3 * delta < delta_by_quadrature(q, z, claimed) <= delta


@settings(max_examples=12, deadline=None)
@given(
    z=st.floats(0.5, 20.0),
    q=st.floats(0.001, 1.0),
    steps=st.integers(1, 2000),
    delta=st.floats(1e-8, 4e-3),
    more=st.floats(1.0, 3.0),
)
def test_monotone(z: float, q: float, steps: int, delta: float, more: float) -> None:
    here = epsilon(steps_of(q, z, steps), delta)
    slack = 1e-9 * (1 + here)
    assert epsilon(steps_of(q, z * more, steps), delta) <= here + slack
    assert epsilon(steps_of(min(1.0, q * more), z, steps), delta) >= here - slack
    assert epsilon(steps_of(q, z, math.ceil(steps * more)), delta) >= here - slack
    assert epsilon(steps_of(q, z, steps), min(0.5, delta * more)) <= here + slack


def test_order_and_grouping_do_not_matter() -> None:
    a, b = steps_of(0.1, 1.0, 3)[0], steps_of(0.2, 2.0, 1)[0]
    costs = {epsilon(list(order), 1e-5) for order in itertools.permutations([a, b, b])}
    assert max(costs) - min(costs) < 1e-12
    assert epsilon(steps_of(0.1, 1.0, 2) * 3, 1e-5) == pytest.approx(epsilon(steps_of(0.1, 1.0, 6), 1e-5))


def test_nothing_costs_nothing() -> None:
    assert epsilon([], 1e-5) == 0.0


def test_local_is_the_gaussian_of_half_the_multiplier() -> None:
    assert epsilon([Local(noise_multiplier=10.0)] * 100, 1e-6) == pytest.approx(11.855, abs=6e-4)


@pytest.mark.parametrize(("target", "expected"), [(6.0, 1.85), (2.0, 4.46)])
def test_calibration_against_reference(target: float, expected: float) -> None:
    z = noise_multiplier_for(target, 1e-5, lambda z: steps_of(0.064, z, 1000))
    assert z == pytest.approx(expected, abs=0.02)
    assert epsilon(steps_of(0.064, z, 1000), 1e-5) <= target
    assert epsilon(steps_of(0.064, z - 2 * MULTIPLIER_STEP, 1000), 1e-5) > target


def test_what_cannot_be_met_is_refused() -> None:
    with pytest.raises(PrivacyError, match="no noise multiplier"):
        noise_multiplier_for(1e-9, 1e-9, lambda z: [Local(noise_multiplier=z)] * 1000)
    with pytest.raises(PrivacyError, match="positive"):
        noise_multiplier_for(0.0, 1e-5, lambda z: [Local(noise_multiplier=z)])


@pytest.mark.parametrize("delta", [0.0, 1e-2, 1.0, -1.0, float("nan")])
def test_a_delta_that_promises_nothing_is_refused(delta: float) -> None:
    with pytest.raises(PrivacyError, match="target_delta"):
        epsilon([], delta)


def test_kinds_do_not_compose() -> None:
    with pytest.raises(PrivacyError, match="do not add up"):
        epsilon([Local(noise_multiplier=1.0), ClientLevel(noise_multiplier=1.0, sample_rate=1.0)], 1e-5)
