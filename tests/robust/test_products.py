"""Low-rank algebra against products that are formed, and the freedom of factors."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fedpeft.aggregation.robust import Entries, Products, krum_selection, lora_pairs
from fedpeft.aggregation.robust.coefficients import geometric_median, krum, multikrum, norm_bound
from fedpeft.config.sections import PeftSection
from fedpeft.updates.update import Arrays, layout_of

CLIENTS, RANK = 6, 3
SHAPES = {"query": (10, 7), "value": (5, 12)}  # m, n
SCALING = 2.0 / RANK
PEFT = PeftSection.model_validate({"method": "lora", "r": RANK, "lora_alpha": 2})


def a_of(module: str) -> str:
    return f"layer.{module}.lora_A.weight"


def b_of(module: str) -> str:
    return f"layer.{module}.lora_B.weight"


def state_of(rng: np.random.Generator, *, started: bool) -> dict[str, NDArray[np.float64]]:
    """LoRA's factors (B is zero where training has not started) and a head beside them."""
    state = {"head": rng.normal(size=(2, 5))}
    for module, (m, n) in SHAPES.items():
        state[a_of(module)] = rng.normal(size=(RANK, n))
        state[b_of(module)] = rng.normal(size=(m, RANK)) * (0.3 if started else 0.0)
    return state


def updates_of(rng: np.random.Generator, state: Arrays) -> list[dict[str, NDArray[np.float64]]]:
    return [
        {name: 0.2 * (place + 1) * rng.normal(size=array.shape) for name, array in state.items()}
        for place in range(CLIENTS)
    ]


def weights_of(state: Arrays, update: Arrays | None = None) -> dict[str, NDArray[np.float64]]:
    """What the model adds to each weight, formed."""
    moved = {name: state[name] + (update[name] if update else 0.0) for name in state}
    found = {module: SCALING * moved[b_of(module)] @ moved[a_of(module)] for module in SHAPES}
    return {**found, "head": moved["head"]}


def change_of(state: Arrays, update: Arrays) -> NDArray[np.float64]:
    before, after = weights_of(state), weights_of(state, update)
    return np.concatenate([(after[name] - before[name]).ravel() for name in sorted(before)])


def turned(rng: np.random.Generator, state: Arrays, update: Arrays) -> dict[str, NDArray[np.float64]]:
    """The same products from other factors: A to G A, B to B G^-1."""
    other = dict(update)
    for module in SHAPES:
        g = rng.normal(size=(RANK, RANK)) + 3.0 * np.eye(RANK)
        a, b = state[a_of(module)] + update[a_of(module)], state[b_of(module)] + update[b_of(module)]
        other[a_of(module)] = g @ a - state[a_of(module)]
        other[b_of(module)] = b @ np.linalg.inv(g) - state[b_of(module)]
    return other


def products(state: Arrays) -> Products:
    return Products(lora_pairs(layout_of(state), PEFT), state)


@pytest.mark.parametrize("started", [False, True])
def test_gram_and_distances_are_those_of_formed_products(started: bool) -> None:
    rng = np.random.default_rng(0)
    state = state_of(rng, started=started)
    updates = updates_of(rng, state)
    dense = np.stack([change_of(state, update) for update in updates])
    np.testing.assert_allclose(products(state).gram(updates), dense @ dense.T, rtol=1e-10)
    flat = np.stack([np.concatenate([u[name].ravel() for name in sorted(u)]) for u in updates])
    np.testing.assert_allclose(Entries().gram(updates), flat @ flat.T, rtol=1e-10)


def test_small_changes_of_large_factors_keep_their_digits() -> None:
    """Where the difference of two norms would have none left."""
    rng = np.random.default_rng(1)
    state = {name: 1e4 * array for name, array in state_of(rng, started=True).items()}
    updates = [{name: 1e-6 * array for name, array in u.items()} for u in updates_of(rng, state)]
    first_order = []
    for update in updates:  # what is left out is 1e-10 of what is there
        parts = [update["head"].ravel()] + [
            SCALING * (update[b_of(m)] @ state[a_of(m)] + state[b_of(m)] @ update[a_of(m)]).ravel()
            for m in SHAPES
        ]
        first_order.append(np.concatenate(parts))
    dense = np.stack(first_order)
    np.testing.assert_allclose(products(state).gram(updates), dense @ dense.T, rtol=1e-7)


@pytest.mark.parametrize("started", [False, True])
def test_nothing_depends_on_the_choice_of_factors(started: bool) -> None:
    rng = np.random.default_rng(2)
    state = state_of(rng, started=started)
    updates = updates_of(rng, state)
    others = [turned(rng, state, update) for update in updates]
    geometry = products(state)
    gram, again = geometry.gram(updates), geometry.gram(others)
    np.testing.assert_allclose(again, gram, rtol=1e-8)
    assert krum_selection(again, 4, 1) == krum_selection(gram, 4, 1)
    weights = np.full(CLIENTS, 1.0 / CLIENTS)
    for rule in (norm_bound, krum, multikrum, geometric_median):
        came = geometry.combine(others, rule(again, weights))
        expected = geometry.combine(updates, rule(gram, weights))
        for name in expected:
            np.testing.assert_allclose(came[name], expected[name], atol=1e-7)
    for update, other in zip(updates, others, strict=True):
        one, two = geometry.canonical(update), geometry.canonical(other)
        for name in one:
            np.testing.assert_allclose(two[name], one[name], atol=1e-7)
    raw, spoilt = Entries().gram(updates), Entries().gram(others)
    assert not np.allclose(raw, spoilt, rtol=0.1)  # entries do depend on it: the test can fail


@pytest.mark.parametrize("started", [False, True])
def test_the_combined_change_is_the_best_of_its_rank(started: bool) -> None:
    rng = np.random.default_rng(3)
    state = state_of(rng, started=started)
    updates, coefficients = updates_of(rng, state), np.array([0.5, 0.0, 0.2, 0.1, 0.0, 0.05])
    change = products(state).combine(updates, coefficients)
    after = weights_of(state, change)
    for module in SHAPES:
        start = weights_of(state)[module]
        each = [weights_of(state, update)[module] - start for update in updates]
        mean = start + sum(c * e for c, e in zip(coefficients, each, strict=True))
        u, s, vt = np.linalg.svd(mean)
        np.testing.assert_allclose(after[module], u[:, :RANK] * s[:RANK] @ vt[:RANK], atol=1e-9)
    head = sum(c * update["head"] for c, update in zip(coefficients, updates, strict=True))
    np.testing.assert_allclose(change["head"], head, rtol=1e-12)


def test_one_update_alone_arrives_whole() -> None:
    rng = np.random.default_rng(4)
    state = state_of(rng, started=False)
    updates = updates_of(rng, state)
    came = weights_of(state, products(state).combine(updates, np.eye(CLIENTS)[2]))
    for name, expected in weights_of(state, updates[2]).items():
        np.testing.assert_allclose(came[name], expected, atol=1e-10)


def test_the_canonical_form_keeps_products_and_the_size_of_a() -> None:
    rng = np.random.default_rng(5)
    state = state_of(rng, started=True)
    geometry, update = products(state), updates_of(rng, state)[0]
    change = geometry.from_canonical(geometry.canonical(update))
    for name, expected in weights_of(state, update).items():
        np.testing.assert_allclose(weights_of(state, change)[name], expected, atol=1e-9)
    for module in SHAPES:
        a = state[a_of(module)] + change[a_of(module)]
        size = np.linalg.norm(state[a_of(module)]) / np.sqrt(RANK)
        np.testing.assert_allclose(a @ a.T, size**2 * np.eye(RANK), atol=1e-9)


def test_a_product_of_lower_rank_goes_on_from_the_states_a() -> None:
    """Nobody has moved B: the model stays as it is, and there are still `RANK` directions to train."""
    rng = np.random.default_rng(6)
    state = state_of(rng, started=False)
    still = {name: np.zeros_like(array) for name, array in state.items()}
    change = products(state).combine([still], np.ones(1))
    for module in SHAPES:
        a = state[a_of(module)] + change[a_of(module)]
        assert np.linalg.matrix_rank(np.concatenate([a, state[a_of(module)]])) == RANK
        assert np.linalg.matrix_rank(a) == RANK
        np.testing.assert_allclose(change[b_of(module)], 0.0, atol=1e-12)


def test_pairs_are_found_by_name_with_peft_s_scalings() -> None:
    layout = {
        "x.q.lora_A.weight": ((4, 8), "<f4"),
        "x.q.lora_B.weight": ((6, 4), "<f4"),
        "x.v.lora_A.weight": ((4, 8), "<f4"),
        "x.v.lora_B.weight": ((6, 4), "<f4"),
        "x.w.lora_B.weight": ((6, 4), "<f4"),  # A is frozen
        "x.conv.lora_A.weight": ((4, 8, 3, 3), "<f4"),
        "x.conv.lora_B.weight": ((6, 4, 1, 1), "<f4"),
        "lora_A": ((4, 8), "<f4"),
    }
    keys = {"method": "lora", "lora_alpha": 16, "alpha_pattern": {"v": 2}}
    pairs = lora_pairs(layout, PeftSection.model_validate(keys))
    assert [(pair.a, pair.b, pair.scaling) for pair in pairs] == [
        ("x.q.lora_A.weight", "x.q.lora_B.weight", 4.0),
        ("x.v.lora_A.weight", "x.v.lora_B.weight", 0.5),
    ]
    stable = PeftSection.model_validate({**keys, "method": "rslora"})
    assert [pair.scaling for pair in lora_pairs(layout, stable)] == [8.0, 1.0]
    assert lora_pairs(layout, PeftSection())[0].scaling == 2.0
