"""What attackers send, who they are, and where they are refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from fedpeft.attacks import (
    ATTACKS,
    AttackContext,
    attackers_of,
    build_attack,
    refuse_attack,
)
from fedpeft.attacks.colluding import reach
from fedpeft.config.run_file import build_run
from fedpeft.config.sections import RunConfig
from fedpeft.errors import RunFileError
from fedpeft.planning.preflight import problems_of
from fedpeft.updates.update import Update

NAMES = [f"client-{number}" for number in range(10)]
RANK = 3
STATE = {
    "head": np.zeros((4, 6), dtype=np.float32),
    "x.lora_A.weight": np.random.default_rng(0).normal(size=(RANK, 8)).astype(np.float32),
    "x.lora_B.weight": np.zeros((5, RANK), dtype=np.float32),
}


def run_with(attack: dict[str, Any], **tables: Any) -> RunConfig:
    federation = {"attack": attack}
    return build_run({"run": {"name": "x", "rounds": 1}, "federation": federation, **tables}, source="test")


def honest(count: int = 4) -> list[Update]:
    rng = np.random.default_rng(1)
    return [
        Update(
            {name: rng.normal(size=a.shape).astype(np.float32) for name, a in STATE.items()}, 5, {"loss": 1.0}
        )
        for _ in range(count)
    ]


def sent(attack: dict[str, Any], updates: Sequence[Update], *, seed: int = 0) -> Update:
    made = build_attack(run_with({**attack, "fraction": 0.3}))
    assert made is not None
    context = AttackContext(np.random.default_rng(seed), STATE, 15, len(updates), lambda: updates)
    return made.on_update(updates[0], context)


@pytest.mark.parametrize(
    ("attack", "factor"),
    [
        ({"kind": "sign-flip"}, -1.0),
        ({"kind": "sign-flip", "scale": 3.0}, -3.0),
        ({"kind": "scaled"}, 10.0),
        ({"kind": "label-flip"}, 1.0),
    ],
)
def test_multiples_of_the_own_update(attack: dict[str, Any], factor: float) -> None:
    updates = honest()
    came = sent(attack, updates)
    for name, array in updates[0].arrays.items():
        np.testing.assert_array_equal(came.arrays[name], np.float32(factor) * array)
        assert came.arrays[name].dtype == np.float32
    assert (came.weight, dict(came.metrics)) == (5, {"loss": 1.0})


def test_whole_numbers_stay_whole() -> None:
    update = Update({"amounts": np.array([3, -5, 0], dtype=np.int64)})
    assert sent({"kind": "sign-flip", "scale": 1.5}, [update]).arrays["amounts"].tolist() == [-4, 8, 0]
    assert sent({"kind": "noise"}, [update]).arrays["amounts"].dtype == np.int64


def test_noise_has_the_size_it_says_and_the_seed_s_values() -> None:
    updates = [Update({"w": np.full((100, 100), 0.5, dtype=np.float32)})]
    came = sent({"kind": "noise", "scale": 4.0}, updates)
    assert came.arrays["w"].std() == pytest.approx(2.0, rel=0.05)
    assert abs(float(came.arrays["w"].mean())) < 0.1
    again, other = sent({"kind": "noise", "scale": 4.0}, updates), sent({"kind": "noise"}, updates, seed=1)
    np.testing.assert_array_equal(came.arrays["w"], again.arrays["w"])
    assert not np.array_equal(came.arrays["w"], other.arrays["w"])


def test_colluders_all_send_what_their_mean_and_spread_say() -> None:
    updates = honest()
    head = np.stack([update.arrays["head"] for update in updates]).astype(np.float64)
    came = sent({"kind": "alie", "z": 1.5}, updates).arrays["head"]
    np.testing.assert_allclose(came, head.mean(0) - 1.5 * head.std(0), rtol=1e-5, atol=1e-6)
    came = sent({"kind": "inner-product", "scale": 0.5}, updates).arrays["head"]
    np.testing.assert_allclose(came, -0.5 * head.mean(0), rtol=1e-5, atol=1e-6)
    assert float(np.sum(came * head.mean(0))) < 0.0


def test_the_reach_of_a_little_is_the_paper_s() -> None:
    """Baruch et al. 2019: 24 of 50 clients are hostile and lack s = 2 of 26, so Phi(z) = 24 / 26."""
    share = 0.5 * (1.0 + math.erf(reach(50, 24) / math.sqrt(2.0)))
    assert share == pytest.approx(24 / 26)
    assert reach(10, 2) == pytest.approx(0.0, abs=1e-9)


def test_the_gauge_attack_leaves_products_as_they_are() -> None:
    updates = honest()
    came = sent({"kind": "gauge", "scale": 7.0}, updates)

    def factors(update: Update) -> tuple[Any, Any]:
        arrays = [STATE[f"x.lora_{role}.weight"] + update.arrays[f"x.lora_{role}.weight"] for role in "AB"]
        return arrays[0].astype(np.float64), arrays[1].astype(np.float64)

    (a, b), (other_a, other_b) = factors(updates[0]), factors(came)
    np.testing.assert_allclose(other_b @ other_a, b @ a, atol=1e-5)
    assert np.linalg.norm(other_a) == pytest.approx(7.0 * np.linalg.norm(a), rel=1e-5)
    np.testing.assert_array_equal(came.arrays["head"], updates[0].arrays["head"])


def test_labels_are_counted_from_the_other_end() -> None:
    attack = build_attack(run_with({"kind": "label-flip", "fraction": 0.3}))
    assert attack is not None
    assert attack.on_labels(np.array([0, 1, 4, 5]), 6).tolist() == [5, 4, 1, 0]


@pytest.mark.parametrize("kind", sorted(ATTACKS))
def test_an_attack_uses_one_hook(kind: str) -> None:
    attack = build_attack(run_with({"kind": kind, "fraction": 0.3}))
    assert attack is not None
    assert attack.kind == kind
    labels = np.array([0, 1, 2])
    changes_labels = not np.array_equal(attack.on_labels(labels, 4), labels)
    updates = honest()
    came = sent({"kind": kind}, updates)
    moved = any(not np.array_equal(came.arrays[name], updates[0].arrays[name]) for name in STATE)
    assert changes_labels != moved
    assert labels.tolist() == [0, 1, 2]


def test_a_share_is_drawn_from_the_seed_and_names_are_taken_as_given() -> None:
    share = run_with({"kind": "sign-flip", "fraction": 0.3})
    drawn = attackers_of(share, NAMES)
    assert len(drawn) == 3
    assert set(drawn) <= set(NAMES)
    assert list(drawn) == sorted(drawn)
    assert attackers_of(share, NAMES[::-1]) == drawn
    seeds = {
        attackers_of(
            run_with({"kind": "sign-flip", "fraction": 0.3}, run={"name": "x", "rounds": 1, "seed": s}), NAMES
        )
        for s in range(20)
    }
    assert len(seeds) > 10
    named = run_with({"kind": "sign-flip", "clients": ["client-7", "client-2"]})
    assert attackers_of(named, NAMES) == ("client-2", "client-7")
    assert attackers_of(build_run({"run": {"name": "x", "rounds": 1}}, source="t"), NAMES) == ()


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        ({"kind": "sign-flip"}, "neither of fraction and clients came"),
        ({"kind": "sign-flip", "fraction": 0.2, "clients": ["a"]}, "both of fraction and clients came"),
        ({"kind": "sign-flip", "fraction": 1.0}, "less than 1"),
        ({"fraction": 0.2}, "kind: is needed"),
    ],
)
def test_who_attacks_must_be_said_once(attack: dict[str, Any], words: str) -> None:
    with pytest.raises(RunFileError, match=words):
        run_with(attack)


def test_unknown_clients_and_lonely_colluders_are_refused() -> None:
    with pytest.raises(RunFileError, match="no client 'nobody'"):
        attackers_of(run_with({"kind": "noise", "clients": ["nobody"]}), NAMES)
    with pytest.raises(RunFileError, match="at least 2 clients that collude"):
        attackers_of(run_with({"kind": "alie", "clients": ["client-1"]}), NAMES)


@pytest.mark.parametrize(
    ("attack", "tables", "words"),
    [
        ({"kind": "sign-flop"}, {}, "unknown kind 'sign-flop'; did you mean 'sign-flip'"),
        ({"kind": "sign-flip", "factor": 2.0}, {}, "federation.attack.factor (sign-flip): unknown option"),
        ({"kind": "scaled", "scale": -1.0}, {}, "greater than 0"),
        ({"kind": "label-flip"}, {}, "takes rows with a class each"),
        ({"kind": "gauge"}, {"space": "projected"}, "about LoRA's factors"),
        ({"kind": "alie"}, {"space": "projected"}, "depend on earlier ones"),
        ({"kind": "alie"}, {"groups": [{"clients": ["a"], "training": {"lr": 0.1}}]}, "remove groups"),
    ],
)
def test_what_makes_no_sense_is_refused(attack: dict[str, Any], tables: dict[str, Any], words: str) -> None:
    run = run_with({**attack, "fraction": 0.5}, **tables)
    assert any(words in problem for problem in problems_of(run)), problems_of(run)


def test_deployed_runs_refuse_attacks() -> None:
    with pytest.raises(RunFileError, match="in simulations only"):
        refuse_attack(run_with({"kind": "noise", "fraction": 0.5}))
    refuse_attack(build_run({"run": {"name": "x", "rounds": 1}}, source="t"))
