"""Was a client in the federation? An attack on what rounds publish never proves more than their epsilon.

Every round is a trial: the attacker sees the state before and after it and looks along the direction in which
the one client pushes. Removing a client is the same as having it send zeros.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedpeft.privacy.accountant import epsilon
from fedpeft.privacy.events import ClientLevel
from tests.flower.private_runs import CLIENT_LEVEL, hold, private_run
from tests.privacy.audit import epsilon_lower_bound

DELTA, TRIALS, RATE = 1e-5, 800, 0.5


def scores(app: str, noise_multiplier: float) -> NDArray[np.float64]:
    privacy: dict[str, Any] = {
        **CLIENT_LEVEL,
        "noise_multiplier": noise_multiplier,
        "max_epsilon": 1e12,
        "seeded": True,  # so that the test's verdict repeats itself
    }
    run = private_run(privacy, rounds=TRIALS, sampling={"kind": "poisson", "rate": RATE})
    return np.array([float(change.sum()) for change in hold(run, app, clients=3).changes])


def proven(noise_multiplier: float) -> float:
    without, with_ = (scores(app, noise_multiplier) for app in ("canary_out", "canary_in"))
    # One seed gives both runs the same coins and noise; half a turn apart they are other trials.
    return epsilon_lower_bound(np.roll(without, TRIALS // 2), with_, DELTA)


def claimed(noise_multiplier: float) -> float:
    return epsilon([ClientLevel(noise_multiplier=noise_multiplier, sample_rate=RATE)], DELTA)


@pytest.mark.slow
def test_a_client_is_hidden_as_claimed() -> None:
    assert 0.3 < proven(0.5) <= claimed(0.5)


@pytest.mark.slow
def test_a_claim_without_its_noise_is_disproved() -> None:
    assert proven(0.03) > claimed(2.0)
