"""Client-level privacy: sensitivity by brute force, noise as promised, and the doors that stay shut."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, kstest, norm  # type: ignore[import-untyped]  # scipy ships no types

from fedpeft.config.sections import FederationSection
from fedpeft.errors import PrivacyError, UpdateError
from fedpeft.privacy.central import (
    CentralMechanism,
    PrivateSum,
    poisson_cohort,
    sample_rate_of,
    sensitivity_quanta,
)
from fedpeft.privacy.clipping import AdaptiveClipping
from fedpeft.privacy.events import ClientLevel
from fedpeft.privacy.noise import SeededNoise, SystemNoise
from fedpeft.runtime.randomness import stream
from fedpeft.updates.update import Update, layout_of

QUANTUM = -36
FALSE_ALARM = 1e-6


def mechanism(**change: float) -> CentralMechanism:
    values = {"clip_norm": 1.0, "noise_multiplier": 1.0, "sample_rate": 0.5, "clients": 8} | change
    return CentralMechanism(**values)  # type: ignore[arg-type]  # numbers of both kinds


def update(seed: int, scale: float = 1.0, size: int = 50, weight: int = 1) -> Update:
    rng = stream(seed, "update")
    values = (scale * rng.normal(size=size)).astype(np.float32)
    return Update({"a": values[: size // 2], "b": values[size // 2 :].reshape(-1, 1)}, weight)


def private_sum(
    cohort: list[str], *, clipping: AdaptiveClipping | None = None, exponent: int = QUANTUM, **change: float
) -> PrivateSum:
    return PrivateSum(
        mechanism(**change), layout_of(update(0).arrays), cohort, quantum_exponent=exponent, clipping=clipping
    )


def flat(mean: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([mean[name].reshape(-1) for name in sorted(mean)])


def source(name: str) -> SeededNoise:
    return SeededNoise(stream(11, name))


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.0, 1e-9, 1e-3, 1.0, 1e6]),
    bound=st.floats(1e-3, 10.0),
    exponent=st.sampled_from([-36, -12, -4]),
    weight=st.integers(1, 9),
)
def test_one_client_moves_the_exact_sum_by_no_more_than_the_sensitivity(
    seed: int, scale: float, bound: float, exponent: int, weight: int
) -> None:
    total = PrivateSum(
        mechanism(clip_norm=bound, max_weight=4),
        layout_of(update(0).arrays),
        ["c"],
        quantum_exponent=exponent,
    )
    total.fold("c", update(seed, scale, weight=weight))
    moved = sum(int(x) ** 2 for array in total._sum.sums().values() for x in array.reshape(-1))
    allowed = 4 * sensitivity_quanta(bound, exponent, 50)
    assert math.sqrt(moved) <= allowed
    assert allowed <= 4 * (math.ldexp(bound, -exponent) + math.sqrt(50)) * 1.001  # and not by much too wide


def test_rounding_every_entry_up_is_priced() -> None:
    """Fifty entries of 0.51 quanta become fifty of 1: nearly twice as long."""
    sent = update(0).map(lambda _, array: np.full_like(array, 0.51 / 16))
    bound = 0.51 / 16 * math.sqrt(50)
    total = PrivateSum(mechanism(clip_norm=bound * 1.001), layout_of(sent.arrays), ["c"], quantum_exponent=-4)
    total.fold("c", sent)
    moved = sum(int((array**2).sum()) for array in total._sum.sums().values())
    assert moved == 50
    assert math.sqrt(moved) <= sensitivity_quanta(bound * 1.001, -4, 50)


def test_noise_has_the_promised_width_and_shape() -> None:
    """Over the expected cohort, whoever came: 0.5 * 8 = 4 clients, noise z * C / 4."""
    size = 40_000
    layout = layout_of(update(0, size=size).arrays)
    for came, name in ((0, "nobody"), (6, "six")):
        cohort = [f"c{i}" for i in range(8)]
        total = PrivateSum(
            mechanism(clip_norm=2.0, noise_multiplier=1.5), layout, cohort, quantum_exponent=QUANTUM
        )
        expected = np.zeros(size)
        for i in range(came):
            sent = update(i, size=size)
            total.fold(f"c{i}", sent)
            values = flat({n: a.astype(float) for n, a in sent.arrays.items()})
            expected += values * min(1.0, 2.0 / float(np.linalg.norm(values)))
        release = total.release(source(name))
        noise = flat(release.mean) - expected / 4.0
        assert release.noise_std == pytest.approx(1.5 * 2.0 / 4.0, rel=1e-6)
        assert kstest(noise / 0.75, norm.cdf).pvalue > FALSE_ALARM
        assert release.event == ClientLevel(noise_multiplier=1.5, sample_rate=0.5)


def test_all_zero_updates_are_safe() -> None:
    total = private_sum(["a", "b"])
    for client in "ab":
        total.fold(client, update(0, 0.0))
    assert all(np.isfinite(array).all() for array in total.release(source("zero")).mean.values())


def test_weights_are_cut_to_the_priced_one() -> None:
    """A client of weight 9 cut to 4 counts 4 times and is divided by 4 * expected; so is the noise."""
    small = update(1, 1e-2)
    total = private_sum(["a"], max_weight=4, noise_multiplier=1e-3, clients=1, sample_rate=1.0)
    total.fold("a", Update(small.arrays, weight=9))
    release = total.release(source("weights"))
    assert release.noise_std == pytest.approx(1e-3, rel=1e-6)
    np.testing.assert_allclose(
        flat(release.mean), flat({n: a.astype(float) for n, a in small.arrays.items()}), atol=6e-3
    )


def test_seed_scalars_get_noise_of_their_own_dimension() -> None:
    values = np.arange(-2000, 2000, dtype=np.int64)
    layout = layout_of({"scalars": values})
    total = PrivateSum(
        mechanism(clip_norm=1000.0, sample_rate=1.0, clients=1), layout, ["a"], quantum_exponent=QUANTUM
    )
    total.fold("a", Update({"scalars": values}))
    mean = total.release(source("scalars")).mean["scalars"]
    assert np.array_equal(mean, np.rint(mean))  # whole numbers, whatever the floats' quantum
    clipped = np.trunc(values * (1000.0 / np.linalg.norm(values.astype(float)) * (1 - 2.0**-20)))
    assert kstest((mean - clipped) / 1000.0, norm.cdf).pvalue > FALSE_ALARM


def test_a_round_is_released_once() -> None:
    total = private_sum(["a"])
    total.release(source("once"))
    with pytest.raises(PrivacyError, match="second draw"):
        total.release(source("twice"))
    with pytest.raises(PrivacyError, match="released"):
        total.fold("a", update(0))


def test_only_the_cohort_counts_and_each_once() -> None:
    total = private_sum(["a"])
    with pytest.raises(PrivacyError, match="not asked"):
        total.fold("b", update(0))
    total.fold("a", update(0))
    with pytest.raises(PrivacyError, match="counted already"):
        total.fold("a", update(0))
    with pytest.raises(PrivacyError, match="drawn from the run's clients"):
        private_sum([str(i) for i in range(9)])


def test_broken_updates_add_nothing() -> None:
    total = private_sum(["a", "b", "c"], noise_multiplier=0.01)
    bad = update(0).map(lambda _, array: array * np.float32("nan"))
    with pytest.raises(UpdateError, match="NaN"):
        total.fold("a", bad)
    with pytest.raises(UpdateError, match="weight"):
        total.fold("b", Update(update(0).arrays, weight=0))
    with pytest.raises(UpdateError):
        total.fold("c", Update({"other": np.ones(3, dtype=np.float32)}))
    mean = flat(total.release(source("broken")).mean)
    assert np.abs(mean).max() < 0.01 * 6 / 4


def test_what_does_not_fit_64_bits_is_refused_before_anyone_is_asked() -> None:
    with pytest.raises(PrivacyError, match="quantum_exponent"):
        private_sum(["a"], clients=10**8, clip_norm=1e6)
    with pytest.raises(PrivacyError, match="quantum_exponent"):
        private_sum(["a"], noise_multiplier=1e9)


def test_adaptive_clipping_shares_the_rounds_price() -> None:
    clipping = AdaptiveClipping(clip_norm=0.5, count_std=2.0)
    total = private_sum(["a", "b"], clipping=clipping, noise_multiplier=1.0)
    total.fold("a", update(0, 1e-3))
    total.fold("b", update(1, 10.0))
    release = total.release(source("adaptive"))
    wider = 1.0 / math.sqrt(1.0 - 1.0 / 16.0)
    assert release.noise_std == pytest.approx(wider * 0.5 / 4.0, rel=1e-6)
    assert release.event.noise_multiplier == 1.0
    assert release.clipping is not None
    assert release.clipping.clip_norm != 0.5
    with pytest.raises(PrivacyError, match="below twice count_std"):
        private_sum(["a"], clipping=AdaptiveClipping(clip_norm=0.5, count_std=0.4))


def test_the_adaptive_pair_costs_what_one_round_says() -> None:
    """1 / z^2 = 1 / z_delta^2 + 1 / (2 sigma_b)^2: zero-concentrated privacy adds."""
    clipping = AdaptiveClipping(clip_norm=1.0, count_std=0.9)
    z = clipping.update_multiplier(1.1)
    assert z**-2 + (2 * 0.9) ** -2 == pytest.approx(1.1**-2, rel=1e-12)


def test_cohorts_are_secret_coins() -> None:
    names = [f"c{i}" for i in range(20_000)]
    cohort = poisson_cohort(SystemNoise(), names, 0.2)
    assert cohort == sorted(cohort)
    low, high = binom.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], len(names), 0.2)
    assert low <= len(cohort) <= high
    assert cohort != poisson_cohort(SystemNoise(), names, 0.2)
    assert poisson_cohort(source("c"), list(reversed(names)), 0.2) == poisson_cohort(source("c"), names, 0.2)
    assert poisson_cohort(SystemNoise(), names, 1.0) == sorted(names)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"sampling": {"kind": "fixed", "cohort": 5}}, "Poisson"),
        ({"sampling": {"kind": "fraction", "fraction": 0.5}}, "Poisson"),
        ({"sampling": {"kind": "poisson", "rate": 0.5}, "over_selection": 0.1}, "over_selection"),
        ({"sampling": {"kind": "poisson", "rate": 0.5}, "weighting": "examples"}, "weighting"),
    ],
)
def test_federations_without_proof_are_refused(section: dict[str, object], says: str) -> None:
    run = FederationSection.model_validate({"weighting": "uniform"} | section)
    with pytest.raises(PrivacyError, match=says) as caught:
        sample_rate_of(run)
    assert "\n" not in str(caught.value)


def test_sample_rates_of_sound_federations() -> None:
    poisson = {"sampling": {"kind": "poisson", "rate": 0.25}, "weighting": "uniform"}
    assert sample_rate_of(FederationSection.model_validate(poisson)) == 0.25
    assert (
        sample_rate_of(FederationSection.model_validate(poisson | {"weighting": "examples"}), max_weight=9)
        == 0.25
    )
    assert sample_rate_of(FederationSection(weighting="uniform")) == 1.0


@pytest.mark.parametrize(
    "change", [{"clients": 0}, {"max_weight": 0}, {"noise_multiplier": 0.0}, {"clip_norm": 0.0}]
)
def test_impossible_mechanisms_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(PrivacyError):
        mechanism(**change)
