"""The noise that a plan proposes is the least that affords the run: checked round by round."""

from __future__ import annotations

from typing import Any

import pytest

from fedpeft.config.run_file import build_run
from fedpeft.planning.privacy_forecast import plan_privacy
from fedpeft.privacy.accountant import epsilon
from fedpeft.privacy.events import ClientLevel, Event, Local

ROUNDS, DELTA, STEP = 30, 1e-4, 1e-3


def needed(privacy: dict[str, Any]) -> float:
    run = build_run(
        {
            "run": {"name": "private", "rounds": ROUNDS},
            "federation": {"weighting": "uniform", "sampling": {"kind": "poisson", "rate": 0.25}},
            "privacy": {"clip_norm": 0.5, "noise_multiplier": 0.7, "target_delta": DELTA} | privacy,
        },
        source="test",
    )
    plan = plan_privacy(run, None)
    assert plan.needed_multiplier is not None
    assert plan.noise_multiplier == 0.7
    return plan.needed_multiplier


@pytest.mark.parametrize("limit", [2.0, 8.0])
def test_the_least_noise_that_affords_every_round(limit: float) -> None:
    multiplier = needed({"kind": "client-level", "max_epsilon": limit})

    def spent(noise: float) -> float:
        event: Event = ClientLevel(noise_multiplier=noise, sample_rate=0.25)
        return epsilon([event] * ROUNDS, DELTA)

    assert spent(multiplier) <= limit < spent(multiplier - STEP)


def test_local_noise_is_not_amplified_by_sampling() -> None:
    multiplier = needed({"kind": "local", "max_epsilon": 3.0})
    assert epsilon([Local(noise_multiplier=multiplier)] * ROUNDS, DELTA) <= 3.0
    assert multiplier > needed({"kind": "client-level", "max_epsilon": 3.0})
