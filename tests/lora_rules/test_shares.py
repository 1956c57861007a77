"""What clients hold and send: parts of the whole, and the way back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedpeft.aggregation.lora_rules import LORA_RULES, Shares
from fedpeft.config.run_file import build_run
from fedpeft.config.sections import RunConfig
from fedpeft.updates.update import Arrays, layout_of

M, N, R = 6, 5, 4
X = "model.layers.1.q_proj"
A, B = f"{X}.lora_A.default.weight", f"{X}.lora_B.default.weight"
HEAD = "score.modules_to_save.default.weight"


def run_of(rule: str | None, *groups: dict[str, Any], alpha: int = 8) -> RunConfig:
    tables: dict[str, Any] = {
        "run": {"name": "x", "rounds": 1},
        "peft": {"method": "ffa-lora" if rule == "ffa" else "lora", "r": R, "lora_alpha": alpha},
        "groups": list(groups),
    }
    if rule is not None:
        tables["federation"] = {"lora_rule": rule}
    return build_run(tables, source="test")


def state_of() -> Arrays:
    rng = np.random.default_rng(0)
    shapes = {A: (R, N), B: (M, R), HEAD: (3, M), f"{X}.residual_A": (7, N), f"{X}.residual_B": (M, 7)}
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def test_without_groups_everybody_holds_everything() -> None:
    for rule in (None, "fedit", "ffa", "hetlora", "flexlora", "flora", "exact-residual"):
        shares = Shares(run_of(rule))
        assert shares.all_alike
        assert shares.view("a", state := state_of()) is state
    assert not Shares(run_of("rolora")).all_alike
    assert not Shares(run_of("fedsa")).all_alike


@pytest.mark.parametrize(("rank", "alpha", "scaling"), [(2, 4, 2.0), (1, 8, 8.0), (3, 1, 1 / 3)])
def test_a_lower_rank_computes_the_product_of_the_first_ranks(rank: int, alpha: int, scaling: float) -> None:
    shares = Shares(run_of("flexlora", {"clients": ["a"], "peft": {"r": rank, "lora_alpha": alpha}}))
    state = state_of()
    view = shares.view("a", state)
    assert view[A].shape == (rank, N)
    assert view[HEAD] is state[HEAD]
    assert np.array_equal(view[f"{X}.residual_A"], state[f"{X}.residual_A"])
    whole = 2.0 * state[B][:, :rank].astype(np.float64) @ state[A][:rank]
    assert np.allclose(scaling * view[B].astype(np.float64) @ view[A], whole, rtol=1e-5)
    update = {name: np.full(array.shape, 0.5, np.float32) for name, array in view.items() if name in (A, B)}
    assert shares.layout("a", layout_of(state), 1).keys() == {A, B, HEAD}
    assert shares.layout("a", layout_of(state), 1)[B] == ((M, rank), "<f4")
    # The client's product after its update, and what the server makes of it, are the same.
    own = scaling * (view[B] + update[B]).astype(np.float64) @ (view[A] + update[A])
    wide = shares.widen("a", update, state)
    seen = 2.0 * (state[B] + wide[B]).astype(np.float64) @ (state[A] + wide[A])
    assert np.allclose(seen, own, rtol=1e-4, atol=1e-5)
    assert not (state[A] + wide[A])[rank:].any()  # ranks that it doesn't hold are zero
    assert not wide[HEAD].any()  # it sent nothing of it
    assert f"{X}.residual_A" not in wide


def test_others_of_the_run_are_not_touched_by_a_group() -> None:
    shares = Shares(run_of("flexlora", {"clients": ["a"], "peft": {"r": 1}}))
    state = state_of()
    assert shares.view("b", state) is state
    sent = {A: np.ones((R, N), np.float32), B: np.ones((M, R), np.float32), HEAD: np.ones((3, M), np.float32)}
    wide = shares.widen("b", sent, state)
    assert all(np.array_equal(wide[name], sent[name]) for name in sent)


def test_rolora_moves_b_then_a_and_the_head_always() -> None:
    shares = Shares(run_of("rolora"))
    for number, moved in ((1, {B, HEAD}), (2, {A, HEAD}), (3, {B, HEAD})):
        assert set(shares.layout("a", layout_of(state_of()), number)) == moved
        assert {name for name in (A, B, HEAD) if not shares.rests(name, number)} == moved


def test_fedsa_shares_a_and_trains_all() -> None:
    shares = Shares(run_of("fedsa"))
    assert set(shares.layout("a", layout_of(state_of()), 1)) == {A}
    assert all(shares.is_trained("a", name, 1) for name in (A, B, HEAD))
    assert set(shares.view("a", state_of())) == {A}
    assert [shares.is_private(name) for name in (A, B, HEAD)] == [False, True, True]


def test_a_group_trains_the_modules_that_it_names() -> None:
    shares = Shares(
        run_of(None, {"clients": ["a"], "trains": ["q_proj"]}, {"clients": ["b"], "trains": ["score"]})
    )
    assert set(shares.layout("a", layout_of(state_of()), 1)) == {A, B}
    assert set(shares.layout("b", layout_of(state_of()), 1)) == {HEAD}
    assert set(shares.layout("c", layout_of(state_of()), 1)) == {A, B, HEAD}


def test_rank_stabilised_scalings() -> None:
    run = run_of("flora", {"clients": ["a"], "peft": {"r": 1}})
    rooted = run.model_copy(update={"peft": run.peft.model_copy(update={"method": "rslora"})})
    assert Shares(run).of("a").ratio == pytest.approx((8 / 4) / (8 / 1))
    assert Shares(rooted).of("a").ratio == pytest.approx((8 / 2) / (8 / 1))


def test_every_rule_says_where_it_comes_from() -> None:
    assert len(LORA_RULES) == 8
    for rule in LORA_RULES.values():
        assert "arXiv" in rule.source
        assert len(rule.summary) < 100
