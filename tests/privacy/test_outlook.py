"""What a run will have spent, against counting round by round; and the charge of a round done twice."""

from __future__ import annotations

import math

import pytest

from fedpeft.privacy.accountant import epsilon
from fedpeft.privacy.budget import FEDERATION, Budget, BudgetLedger, Charge
from fedpeft.privacy.budget_forecast import MOST_ROUNDS, affordable_rounds, outlook
from fedpeft.privacy.events import ClientLevel, Event, Local, RecordLevel

DELTA = 1e-5


def counted(event: Event, limit: float) -> int:
    rounds = 0
    while epsilon([event] * (rounds + 1), DELTA) <= limit:
        rounds += 1
    return rounds


@pytest.mark.parametrize(
    ("event", "limit"),
    [
        (ClientLevel(noise_multiplier=2.0, sample_rate=0.1), 2.0),
        (RecordLevel(noise_multiplier=1.0, sample_rate=0.05, steps=10), 4.0),
        (Local(noise_multiplier=20.0), 3.0),
        (ClientLevel(noise_multiplier=0.3, sample_rate=1.0), 1.0),  # not a single one
    ],
)
def test_affordable_rounds(event: Event, limit: float) -> None:
    rounds = counted(event, limit)
    budget = Budget(target_delta=DELTA, max_epsilon=limit)
    assert affordable_rounds(event, budget) == rounds
    seen = outlook(event, budget, rounds + 3)
    assert seen.stops
    assert seen.epsilon == epsilon([event] * rounds, DELTA)
    assert not outlook(event, budget, rounds).stops


def test_nobody_looks_further_than_a_million_rounds() -> None:
    budget = Budget(target_delta=DELTA, max_epsilon=1e9)
    assert affordable_rounds(ClientLevel(noise_multiplier=9.0, sample_rate=0.01), budget) == MOST_ROUNDS


def test_draws_over_one_cohort_cost_more_than_cohorts_of_their_own() -> None:
    once = ClientLevel(noise_multiplier=1.0, sample_rate=0.1)
    ledger = BudgetLedger().charge([Charge(1, FEDERATION, (once,))])
    for draws in (2, 3):
        ledger = ledger.recharge(1, [FEDERATION], once)
        same = ClientLevel(noise_multiplier=1.0 / math.sqrt(draws), sample_rate=0.1)
        assert ledger.epsilon(DELTA) == pytest.approx(epsilon([same], DELTA), rel=1e-12)
        assert ledger.epsilon(DELTA) > epsilon([once] * draws, DELTA)
    assert BudgetLedger.from_json(ledger.to_json()) == ledger


def test_elsewhere_every_attempt_is_a_release() -> None:
    step = RecordLevel(noise_multiplier=1.0, sample_rate=0.1, steps=3)
    ledger = BudgetLedger().recharge(1, ["a", "b"], step).recharge(1, ["b"], step)
    assert ledger.events("a") == [step]
    assert ledger.events("b") == [step, step]
