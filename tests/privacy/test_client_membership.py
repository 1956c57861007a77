"""Is a client in the sum? What an attack proves never exceeds the claim; without noise it proves much."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from fedpeft.privacy.accountant import epsilon
from fedpeft.privacy.central import CentralMechanism, PrivateSum
from fedpeft.privacy.events import ClientLevel
from fedpeft.privacy.noise import NoiseSource, SeededNoise
from fedpeft.runtime.randomness import stream
from fedpeft.updates.update import Update, layout_of
from tests.privacy.audit import epsilon_lower_bound

DELTA = 1e-5
SIZE = 4


def test_the_bound_itself() -> None:
    """Nothing for equal scores, something for Gaussians at distance 1, all there is for scores far apart."""
    rng = stream(1, "audit")
    base = rng.normal(size=4000)
    assert epsilon_lower_bound(base, rng.normal(size=4000), DELTA) == 0.0
    near = epsilon_lower_bound(base, rng.normal(size=4000) + 1.0, DELTA)
    far = epsilon_lower_bound(base, rng.normal(size=4000) + 9.0, DELTA)
    assert 0.7 < near < epsilon([ClientLevel(noise_multiplier=1.0, sample_rate=1.0)], DELTA)
    # No false alarm among 2,000: at most about ln(2000 / ln(4 / 0.001)).
    assert far == pytest.approx(math.log(2000 / math.log(4000)), abs=0.1)


def scores(member: bool, noise_multiplier: float, trials: int, source: NoiseSource) -> NDArray[np.float64]:
    """The released mean along the direction in which the canary pushes, over releases of one round."""
    arrays = {"a": np.array([0.3, -0.1, 0.2, 0.0], dtype=np.float32)}
    canary = {"a": np.array([5.0, 0.0, 0.0, 0.0], dtype=np.float32)}
    mechanism = CentralMechanism(clip_norm=0.5, noise_multiplier=noise_multiplier, sample_rate=1.0, clients=2)
    found = []
    for _ in range(trials):
        total = PrivateSum(mechanism, layout_of(arrays), ["x", "canary"], quantum_exponent=-36)
        total.fold("x", Update(arrays))
        if member:
            total.fold("canary", Update(canary))
        found.append(float(total.release(source).mean["a"][0]))
    return np.array(found)


def proven(noise_multiplier: float, trials: int, *, hidden_multiplier: float | None = None) -> float:
    used = noise_multiplier if hidden_multiplier is None else hidden_multiplier
    source = SeededNoise(stream(5, "membership"))
    without, with_ = (scores(member, used, trials, source) for member in (False, True))
    return epsilon_lower_bound(without, with_, DELTA)


def test_a_client_is_hidden_as_claimed() -> None:
    claimed = epsilon([ClientLevel(noise_multiplier=0.7, sample_rate=1.0)], DELTA)
    assert 0.5 < proven(0.7, 2000) <= claimed


def test_without_noise_the_claim_would_be_disproved() -> None:
    claimed = epsilon([ClientLevel(noise_multiplier=2.0, sample_rate=1.0)], DELTA)
    assert proven(2.0, 2000, hidden_multiplier=0.05) > claimed
