"""Private rounds: what they cost, what they release, and what survives a crash."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import kstest, norm  # type: ignore[import-untyped]  # scipy ships no types

from fedpeft.errors import PrivacyError, StateError
from fedpeft.ledger.records import ClientOutcome, Round
from fedpeft.privacy.accountant import epsilon
from fedpeft.privacy.budget import BudgetLedger
from fedpeft.privacy.events import ClientLevel, Event, Local, RecordLevel
from fedpeft.rounds.private_rounds import open_privacy
from tests.flower.private_runs import CLIENT_LEVEL, CLIENTS, Disk, KilledError, hold, private_run

DELTA = 1e-5
FALSE_ALARM = 1e-6
EVENT = ClientLevel(noise_multiplier=1.0, sample_rate=0.25)
LOCAL = {
    "kind": "local",
    "clip_norm": 1.0,
    "noise_multiplier": 4.0,
    "target_delta": DELTA,
    "max_epsilon": 1000.0,
}
RECORD = {
    "kind": "record-level",
    "max_grad_norm": 1.0,
    "noise_multiplier": 1.0,
    "sample_rate": 0.1,
    "expected_batch_size": 8.0,
    "target_delta": DELTA,
    "max_epsilon": 1000.0,
}


def spent(disk: Disk) -> BudgetLedger:
    return BudgetLedger.from_json(disk.ledgers[-1])


def test_epsilon_of_each_round_is_the_accountants() -> None:
    disk = hold(private_run(CLIENT_LEVEL), "zeros")
    assert disk.epsilons == [0.0, *(epsilon([EVENT] * n, DELTA) for n in (1, 2, 3))]
    assert spent(disk).charges == {(n, "federation"): (EVENT,) for n in (1, 2, 3)}


def test_all_zero_updates_release_noise_and_nothing_else() -> None:
    """Of the width z C / (q N) in every entry, whoever came; Kolmogorov and Smirnov's test at one in a"
    " million."""
    size = 30_000
    disk = hold(private_run({**CLIENT_LEVEL, "seeded": True}, rounds=2), "zeros", size=size)
    width = 1.0 * 0.5 / (0.25 * CLIENTS)
    first, second = disk.changes
    for change in (first, second):
        assert kstest(change / width, norm.cdf).pvalue > FALSE_ALARM
    assert abs(np.corrcoef(first, second)[0, 1]) < norm.isf(FALSE_ALARM) / math.sqrt(size)
    assert disk.checkpoints[1].row.state_norm_change == pytest.approx(np.linalg.norm(first), rel=1e-4)


def _momentum(releases: list[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
    """With momentum 0.5: each move is the release and half the move before."""
    moves = [releases[0]]
    for release in releases[1:]:
        moves.append(release + 0.5 * moves[-1])
    return moves


def _adagrad(releases: list[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
    """Each release over the root of the sum of squares so far."""
    squares = np.cumsum(np.square(releases), axis=0)
    return [release / np.sqrt(total) for release, total in zip(releases, squares, strict=True)]


@pytest.mark.parametrize(
    ("strategy", "oracle"),
    [
        ({"kind": "fedavgm", "server_momentum": 0.5, "server_learning_rate": 1.0}, _momentum),
        ({"kind": "fedadagrad", "eta": 1.0, "tau": 1e-12}, _adagrad),
    ],
)
def test_server_optimizers_work_on_what_is_released(
    strategy: dict[str, Any], oracle: Callable[[list[NDArray[np.float64]]], list[NDArray[np.float64]]]
) -> None:
    seeded = {**CLIENT_LEVEL, "seeded": True}
    releases = hold(private_run(seeded), "zeros").changes
    moves = hold(private_run(seeded, strategy=strategy), "zeros").changes
    np.testing.assert_allclose(moves, oracle(releases), rtol=1e-4, atol=1e-6)


def counts(disk: Disk) -> list[int]:
    """How many came each round, read off releases whose noise is next to nothing."""
    unit = 0.5 / math.sqrt(4) / (0.25 * CLIENTS)  # what one clipped update of ones moves each entry
    found = [float(change.mean()) / unit for change in disk.changes]
    assert np.allclose(found, np.rint(found), atol=0.05)
    return [round(value) for value in found]


QUIET = {**CLIENT_LEVEL, "noise_multiplier": 0.01, "max_epsilon": 1e12}


def test_the_sum_is_divided_by_the_expected_cohort_and_cohorts_are_secret() -> None:
    run = private_run(QUIET, rounds=30)
    first, second = counts(hold(run, "ones")), counts(hold(run, "ones"))
    assert len(set(first)) > 2  # a fixed cohort would show one number, a realised divisor too
    assert first != second, "two runs of one file drew the same cohorts: the public seed has a part in them"
    seeded = private_run({**QUIET, "seeded": True}, rounds=30)
    assert counts(hold(seeded, "ones")) == counts(hold(seeded, "ones"))


def test_rows_tell_nothing_of_the_cohort() -> None:
    disk = hold(private_run(CLIENT_LEVEL), "ones")
    for checkpoint in disk.checkpoints[1:]:
        row = checkpoint.row
        kept = Round(
            round=row.round,
            state_norm_change=row.state_norm_change,
            epsilon=row.epsilon,
            epsilon_cohort=row.epsilon_cohort,
        )
        assert row == kept
        seen = [replace(EVENT, sample_rate=1.0)] * row.round
        assert row.epsilon_cohort == epsilon(seen, DELTA), "against those who see whom rounds ask"
    assert disk.shown == []
    assert set(disk.asked) == {0}


@pytest.mark.parametrize("app", ["failing", "poisoned"])
def test_what_fails_or_is_refused_is_a_zero_and_ends_nothing(app: str) -> None:
    disk = hold(private_run(QUIET, rounds=4, quorum=1.0), app)
    assert len(disk.checkpoints) == 5
    assert all(np.abs(change).max() < 0.01 * 6 for change in disk.changes)
    assert all(change.any() for change in disk.changes)  # noise is released all the same
    told = {(item.status, item.bytes_up, item.loss) for item in disk.shown}
    assert told == {("failed" if app == "failing" else "refused", 0, None)}
    assert all(item.reason for item in disk.shown)


def test_the_run_ends_before_the_round_that_the_budget_does_not_allow() -> None:
    limit = 0
    while epsilon([EVENT] * (limit + 1), DELTA) <= 8.0:
        limit += 1
    disk = hold(private_run({**CLIENT_LEVEL, "max_epsilon": 8.0}, rounds=limit + 5), "zeros")
    assert 0 < limit < 20
    assert [checkpoint.round for checkpoint in disk.checkpoints] == list(range(limit + 1))
    assert len(disk.ledgers) == limit
    again = hold(private_run({**CLIENT_LEVEL, "max_epsilon": 8.0}, rounds=limit + 5), "zeros", disk)
    assert len(again.checkpoints) == limit + 1  # and stays ended


def crashed(run: Any, at: str) -> Disk:
    disk = Disk(dies_at=at)
    with pytest.raises(KilledError):
        hold(run, "zeros", disk)
    disk.dies_at = ""
    return disk


def test_a_crash_between_spend_and_commit_pays_for_both_draws() -> None:
    """Two draws of noise over one cohort: together as one whose noise is sqrt(2) times smaller."""
    run = private_run(CLIENT_LEVEL)
    disk = crashed(run, "release 2")
    assert len(disk.ledgers) == 2
    assert len(disk.checkpoints) == 2
    hold(run, "zeros", disk)
    twice = ClientLevel(noise_multiplier=1.0 / math.sqrt(2.0), sample_rate=0.25)
    assert disk.epsilons[-1] == pytest.approx(epsilon([EVENT, twice, EVENT], DELTA), rel=1e-12)
    assert disk.epsilons[-1] is not None
    assert disk.epsilons[-1] > epsilon([EVENT] * 4, DELTA)  # dearer than two rounds with cohorts of their own


def test_a_crash_before_the_ledger_is_written_costs_nothing() -> None:
    run = private_run(CLIENT_LEVEL)
    disk = crashed(run, "spend 2")
    assert len(disk.ledgers) == 1
    hold(run, "zeros", disk)
    assert disk.epsilons == hold(run, "zeros").epsilons


def test_crashes_count_against_the_budget() -> None:
    run = private_run({**CLIENT_LEVEL, "max_epsilon": epsilon([EVENT] * 3, DELTA) * 1.001})
    disk = crashed(run, "release 3")
    hold(run, "zeros", disk)
    assert [checkpoint.round for checkpoint in disk.checkpoints] == [0, 1, 2]


@pytest.mark.parametrize("at", ["spend 2", "release 2"])
def test_seeded_noise_is_drawn_again_as_it_was(at: str) -> None:
    run = private_run({**CLIENT_LEVEL, "seeded": True})
    disk = crashed(run, at)
    hold(run, "zeros", disk)
    whole = hold(run, "zeros")
    assert disk.epsilons == whole.epsilons
    for one, two in zip(disk.checkpoints, whole.checkpoints, strict=True):
        assert one.state["a"].tobytes() == two.state["a"].tobytes()


@pytest.mark.parametrize(
    ("ledgers", "says"), [([], "is gone"), (["{"], "cannot be read"), (slice(1), "knows less")]
)
def test_no_run_goes_on_without_its_whole_ledger(ledgers: Any, says: str) -> None:
    run = private_run(CLIENT_LEVEL)
    disk = crashed(run, "release 3")
    disk.ledgers = disk.ledgers[ledgers] if isinstance(ledgers, slice) else ledgers
    with pytest.raises(StateError, match=says) as caught:
        hold(run, "zeros", disk)
    assert "\n" not in str(caught.value)


def test_the_adaptive_bound_falls_by_the_rule_and_is_in_the_checkpoint() -> None:
    """All updates are zero, so the released share is near one and C shrinks by exp(-0.2 (1 - 0.5)) or so."""
    privacy = {**CLIENT_LEVEL, "noise_multiplier": 0.05, "target_quantile": 0.5, "count_std": 0.05}
    run = private_run(
        {**privacy, "max_epsilon": 1e12, "seeded": True}, sampling={"kind": "poisson", "rate": 1.0}
    )
    disk = hold(run, "zeros")
    bounds = [float(checkpoint.privacy["clip_norm"][0]) for checkpoint in disk.checkpoints[1:]]
    shrink = math.exp(-0.2 * 0.5)
    assert bounds == pytest.approx([0.5 * shrink**n for n in (1, 2, 3)], rel=0.01)
    cut = Disk(disk.checkpoints[:2], disk.ledgers[:1])
    assert float(hold(run, "zeros", cut).checkpoints[-1].privacy["clip_norm"][0]) == bounds[-1]
    cut = Disk([disk.checkpoints[0], _without_bound(disk.checkpoints[1])], disk.ledgers[:1])
    with pytest.raises(StateError, match="adaptive clipping bound"):
        hold(run, "zeros", cut)


def _without_bound(checkpoint: Any) -> Any:
    return replace(checkpoint, privacy={})


@pytest.mark.parametrize(
    ("privacy", "event"),
    [
        (LOCAL, Local(noise_multiplier=4.0)),
        (RECORD, RecordLevel(noise_multiplier=1.0, sample_rate=0.1, steps=2)),
    ],
)
def test_clients_have_accounts_and_the_run_costs_what_the_dearest_does(
    privacy: dict[str, Any], event: Event
) -> None:
    """Cohorts are public here: whoever was asked, of the rows' own account, is charged."""
    disk = hold(private_run(privacy, rounds=4, sampling={"kind": "fixed", "cohort": 3}), "ones", clients=6)
    asked: Counter[str] = Counter()
    for checkpoint in disk.checkpoints[1:]:
        asked.update(outcome.client for outcome in checkpoint.row.outcomes)
        assert checkpoint.row.epsilon == epsilon([event] * max(asked.values()), DELTA)
        assert checkpoint.row.train_loss is None
        assert all(item.loss is None and item.examples == 0 for item in checkpoint.row.outcomes)
    assert 1 < max(asked.values()) < 4 + 1
    assert {key[1]: 0 for key in spent(disk).charges} == dict.fromkeys(asked, 0)
    assert all(isinstance(item, ClientOutcome) and item.loss is None for item in disk.shown)


def test_clients_draw_anew_after_a_crash_and_pay_again() -> None:
    event = RecordLevel(noise_multiplier=1.0, sample_rate=0.1, steps=2)
    run = private_run(RECORD, sampling={"kind": "all"})
    disk = Disk(dies_at="release 2")
    with pytest.raises(KilledError):
        hold(run, "ones", disk, clients=3)
    disk.dies_at = ""
    hold(run, "ones", disk, clients=3)
    assert disk.epsilons[-1] == epsilon([event] * 4, DELTA)


def test_a_private_run_needs_a_ledger() -> None:
    with pytest.raises(PrivacyError, match="no place for its ledger"):
        open_privacy(private_run(CLIENT_LEVEL), None, CLIENTS, None)


def test_a_delta_of_one_over_the_clients_is_refused_once_they_are_known() -> None:
    run = private_run({**CLIENT_LEVEL, "target_delta": 1.0 / 200})
    with pytest.raises(PrivacyError, match="200 clients"):
        open_privacy(run, Disk(), 200, None)
    open_privacy(run, Disk(), 199, None)


def test_the_ledger_names_what_it_charges() -> None:
    plain = json.loads(hold(private_run(CLIENT_LEVEL), "zeros").ledgers[-1])
    assert plain["events"][0]["neighbours"].startswith("federations that differ by")
