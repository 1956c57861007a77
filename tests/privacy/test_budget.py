"""The ledger: one charge per round and holder, whatever happens, and never beyond the budget."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import PrivacyError, StateError
from fedpeft.privacy.accountant import epsilon
from fedpeft.privacy.budget import FEDERATION, Budget, BudgetLedger, Charge
from fedpeft.privacy.events import ClientLevel, Event, Local, RecordLevel

DELTA = 1e-5
ROUND = ClientLevel(noise_multiplier=2.0, sample_rate=0.1)


def charge(round_: int, event: Event = ROUND, holder: str = FEDERATION) -> Charge:
    return Charge(round_, holder, (event,))


def after(rounds: int) -> BudgetLedger:
    ledger = BudgetLedger()
    for round_ in range(1, rounds + 1):
        ledger = ledger.charge([charge(round_)])
    return ledger


def test_epsilon_is_that_of_all_charges() -> None:
    assert after(0).epsilon(DELTA) == 0.0
    assert after(7).epsilon(DELTA) == epsilon([ROUND] * 7, DELTA)
    assert after(7).kind == "client-level"


def test_charging_again_changes_nothing() -> None:
    ledger = after(3)
    assert ledger.charge([charge(3)]) == ledger
    assert ledger.charge([charge(1), charge(2)]) == ledger


def test_another_charge_for_a_charged_round_is_refused() -> None:
    other = ClientLevel(noise_multiplier=9.0, sample_rate=0.1)
    with pytest.raises(PrivacyError, match="charged already"):
        after(3).charge([charge(3, other)])
    with pytest.raises(PrivacyError, match="in order"):
        after(3).charge([charge(2, holder="another")])
    with pytest.raises(PrivacyError, match="in order"):
        after(0).charge([charge(0)])


def test_kinds_never_share_a_ledger() -> None:
    with pytest.raises(PrivacyError, match="do not add up"):
        after(1).charge([charge(2, Local(noise_multiplier=1.0))])


def test_the_run_stops_before_the_budget_is_exceeded() -> None:
    budget, ledger = Budget(target_delta=DELTA, max_epsilon=2.0), BudgetLedger()
    rounds = 0
    while epsilon([ROUND] * (rounds + 1), DELTA) <= 2.0:
        ledger, spending = ledger.spend([charge(rounds + 1)], budget)
        rounds += 1
        assert spending.after == epsilon([ROUND] * rounds, DELTA)
    with pytest.raises(PrivacyError, match="the run stops here") as caught:
        ledger.spend([charge(rounds + 1)], budget)
    assert "\n" not in str(caught.value)
    assert rounds > 1
    assert ledger == after(rounds)  # what was refused was not charged


def test_each_holder_has_an_account_and_the_run_costs_the_dearest() -> None:
    step = RecordLevel(noise_multiplier=1.0, sample_rate=0.1, steps=5)
    ledger = (
        BudgetLedger().charge([charge(1, step, "a"), charge(1, step, "b")]).charge([charge(2, step, "b")])
    )
    assert ledger.holders == ["a", "b"]
    assert ledger.events("a") == [step]
    assert ledger.epsilon(DELTA) == epsilon([step] * 2, DELTA)
    _, spending = ledger.spend([charge(3, step, "b")], Budget(target_delta=DELTA, max_epsilon=99.0))
    assert (spending.holder, spending.before) == ("b", ledger.epsilon(DELTA))


@settings(max_examples=30, deadline=None)
@given(crashes=st.lists(st.integers(0, 2), min_size=1, max_size=8))
def test_a_run_that_crashes_anywhere_spends_as_one_that_does_not(crashes: list[int]) -> None:
    """0: no crash; 1: before the round's ledger is on disk; 2: after, before the round is released."""
    budget = Budget(target_delta=DELTA, max_epsilon=100.0)
    disk = BudgetLedger().to_json()
    for round_, crash in enumerate(crashes, start=1):
        for attempt in range(2 if crash else 1):
            ledger, _ = BudgetLedger.from_json(disk).spend([charge(round_)], budget)
            if crash == 1 and attempt == 0:
                continue
            disk = ledger.to_json()
    assert BudgetLedger.from_json(disk) == after(len(crashes))


def test_json_is_small_and_exact() -> None:
    ledger = after(1000)
    text = ledger.to_json()
    assert len(text) < 40_000
    assert BudgetLedger.from_json(text) == ledger
    assert BudgetLedger.from_json(text).to_json() == text


@pytest.mark.parametrize(
    "damage",
    [
        lambda plain: plain.update(version=2),
        lambda plain: plain.pop("events"),
        lambda plain: plain["charges"].append(plain["charges"][0]),
        lambda plain: plain["charges"].append([4, FEDERATION, [7]]),
        lambda plain: plain["charges"].append([4, FEDERATION, [-1]]),
        lambda plain: plain["charges"].append(["4", FEDERATION, [0]]),
        lambda plain: plain["charges"].append([0, FEDERATION, [0]]),
        lambda plain: plain["events"][0].update(noise_multiplier=-1.0),
    ],
)
def test_a_damaged_ledger_is_never_an_empty_one(damage: object) -> None:
    plain = json.loads(after(3).to_json())
    damage(plain)  # type: ignore[operator]  # one of the functions above
    with pytest.raises(StateError, match="ledger of spent privacy"):
        BudgetLedger.from_json(json.dumps(plain))


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '"x"'])
def test_what_is_no_ledger_is_refused(text: str) -> None:
    with pytest.raises(StateError, match="cannot be read"):
        BudgetLedger.from_json(text)


def test_a_budget_must_be_one() -> None:
    with pytest.raises(PrivacyError, match="max_epsilon"):
        Budget(target_delta=DELTA, max_epsilon=0.0)
    with pytest.raises(PrivacyError, match=re.escape("target_delta")):
        Budget(target_delta=1.0, max_epsilon=1.0)
