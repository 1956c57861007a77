"""The projected space: coefficients against dot products by definition, unbiasedness, and exact replay."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedpeft.config.run_file import build_run
from fedpeft.config.sections import PeftSection, RunConfig, TrainingSection
from fedpeft.errors import ModelError, TrainingError, UpdateError
from fedpeft.models.attach import attach
from fedpeft.planning.preflight import problems_of
from fedpeft.seedspace.project import quantise
from fedpeft.seedspace.trainable_tensors import trainable_parameters
from fedpeft.spaces import build_space
from fedpeft.spaces.allocation import FEWEST, count_shared, squared_norm
from fedpeft.spaces.projected import LARGEST, Projected
from fedpeft.spaces.projected_options import estimate_move, fitting_exponent
from fedpeft.spaces.projections import PROJECTIONS, divide_rounded
from fedpeft.updates.update import Arrays, arrays_digest, layout_of
from tests.models.tiny import tiny_base
from tests.spaces.oracles import sign

SEED = 5
KINDS = ["signs", "srht"]


def run_of(**keys: Any) -> RunConfig:
    tables = {
        "run": {"name": "projected", "rounds": 4, "seed": SEED},
        "peft": {"method": "ln-tuning"},
        "training": {"lr": 1e-3},
        **keys,
    }
    tables["space"] = {"kind": "projected", "num_seeds": 6, **keys.get("space", {})}
    return build_run(tables, source="test")


def model_of() -> nn.Module:
    return attach(tiny_base("llama"), PeftSection(method="ln-tuning"), task="causal-lm", seed=0)


def opened(model: nn.Module, **space: Any) -> Projected:
    result = build_space(run_of(space=space), model)
    assert isinstance(result, Projected)
    return result


def applied(space: Projected, state: Arrays, *updates: Arrays) -> Arrays:
    mean = np.mean([update["amounts"] for update in updates], axis=0)
    return space.apply(state, {"amounts": mean})


def shifted(model: nn.Module, generator: np.random.Generator) -> None:
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            noise = generator.standard_normal(tuple(parameter.shape))
            parameter.add_(torch.from_numpy(1e-2 * noise).float())


def test_sign_coefficients_are_dot_products_over_their_number() -> None:
    projection = PROJECTIONS["signs"](SEED, 3, 200, 4)
    change = np.random.default_rng(0).integers(-9999, 9999, 200)
    came = projection.coefficients(torch.from_numpy(change), 2).tolist()
    for k in range(4):
        dot = sum(int(c) * sign(SEED, 3, 2 * 4 + k, place) for place, c in enumerate(change))
        assert abs(came[k] - dot / 4) <= 0.5
    rebuilt = projection.rebuild(torch.tensor([1, 0, -3, 0]), 2)
    assert rebuilt[170] == sign(SEED, 3, 8, 170) - 3 * sign(SEED, 3, 10, 170)


@pytest.mark.parametrize("kind", KINDS)
def test_the_rebuilt_change_is_unbiased(kind: str) -> None:
    change = torch.from_numpy(np.random.default_rng(1).integers(-4000, 4000, 96))
    rounds, count = 3000, 16
    projection = PROJECTIONS[kind](SEED, 0, 96, count)
    total = torch.zeros(96, dtype=torch.int64)
    for number in range(rounds):
        total += projection.rebuild(projection.coefficients(change, number), number)
    error = total.double() / rounds - change
    # A rebuilt entry has standard deviation of about |change| / sqrt(count), here over all rounds; 5 of them
    # are exceeded by any of 96 entries with probability 6e-5.
    assert float(error.abs().max()) < 5 * float(change.double().norm()) / (count * rounds) ** 0.5
    assert float(change.double().abs().mean()) > 5 * float(change.double().norm()) / (count * rounds) ** 0.5


@pytest.mark.parametrize("count", [8, 64, 256])
def test_more_coefficients_never_make_it_worse(count: int) -> None:
    """Against the same projection in real numbers: rounding adds little, however many coefficients there are.

    A quantum that follows the rate alone gets too coarse for coefficients that fall as their number grows.
    """
    size, lr = 256, 1e-3
    exponent = fitting_exponent(lr, size, count)
    change = lr * np.random.default_rng(5).standard_normal(size)
    projection = PROJECTIONS["signs"](SEED, 0, size, count)
    whole = quantise(torch.from_numpy(change), exponent)
    rounded, exact = [], []
    for number in range(256 // count):
        rebuilt = projection.rebuild(projection.coefficients(whole, number), number)
        directions = range(number * count, (number + 1) * count)
        table = [[sign(SEED, 0, k, place) for place in range(size)] for k in directions]
        signs = np.array(table, dtype=np.float64)
        rounded.append(rebuilt.double().numpy() * 2.0**exponent - change)
        exact.append(signs.T @ (signs @ change) / count - change)
    assert np.square(rounded).mean() < 1.03 * np.square(exact).mean()
    error = math.sqrt(np.square(exact).mean() / np.square(change).mean())
    assert error == pytest.approx(math.sqrt(size / count), rel=0.2)


def test_the_quantum_follows_the_steps_and_the_kind_of_optimiser() -> None:
    def move(**keys: Any) -> float:
        return estimate_move(TrainingSection(lr=1e-2, **keys), 10_000)

    assert move(optimizer="adamw", steps=4) == pytest.approx(2e-2)
    assert move(optimizer="sgd", steps=4) == pytest.approx(2e-4)
    assert move(optimizer="sgd", steps=1, max_grad_norm=0.5, momentum=0.9) == pytest.approx(5e-4)


def test_the_plan_says_how_far_off_each_block_is() -> None:
    facts = opened(model_of(), num_seeds=6).facts()
    errors = [key for key in facts if key.startswith("error, ")]
    assert errors == ["error, 32 weights on 6"]
    assert facts[errors[0]] == "2.3"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 3, 64, 100, 5000])
def test_projections_fit_every_size(kind: str, size: int) -> None:
    projection = PROJECTIONS[kind](SEED, 0, size, 2)
    coefficients = projection.coefficients(torch.ones(size, dtype=torch.int64), 1)
    assert coefficients.shape == (projection.count,)
    assert projection.rebuild(coefficients, 1).shape == (size,)


def test_division_rounds_to_nearest() -> None:
    values = torch.tensor([-7, -6, -5, -4, 4, 5, 6, 7])
    assert divide_rounded(values, 4).tolist() == [-2, -1, -1, -1, 1, 1, 2, 2]


def test_coefficients_follow_the_square_root_of_the_size() -> None:
    model = attach(tiny_base("llama"), PeftSection(method="full"), task="causal-lm", seed=0)
    space = build_space(run_of(space={"num_seeds": 100}), model)
    assert isinstance(space, Projected)
    shapes = {name: p.numel() for name, p in trainable_parameters(model).items()}
    widest = max(shapes.values())
    for name, projection in space.projections.items():
        assert projection.count == max(2, int(100 * (shapes[name] / widest) ** 0.5))


@pytest.mark.parametrize("kind", KINDS)
def test_late_joiner_and_veteran_hold_the_same_bits(kind: str) -> None:
    rng = np.random.default_rng(2)
    server, veteran, late, client = (model_of() for _ in range(4))
    spaces = [opened(model, projection=kind) for model in (server, veteran, late, client)]
    state = spaces[0].initial_state({})
    for _ in range(3):
        updates = []
        for _ in range(2):
            spaces[3].enter({}, state)
            shifted(client, rng)
            updates.append(spaces[3].express({}, state))
        state = applied(spaces[0], state, *updates)
        spaces[1].enter({}, state)
    spaces[2].enter({}, state)
    pairs = zip(trainable_parameters(veteran).values(), trainable_parameters(late).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(
        next(iter(trainable_parameters(late).values())), next(iter(trainable_parameters(model_of()).values()))
    )


def test_the_state_is_the_rounds_coefficients() -> None:
    model = model_of()
    space = opened(model)
    state = space.initial_state({})
    ones = {"amounts": np.full(space.count, 2.4)}
    state = space.apply(space.apply(state, ones), {"amounts": np.full(space.count, -1.0)})
    assert state["next"].tolist() == [2]
    assert state["amounts"].tolist() == [2] * space.count + [-1] * space.count + [0] * (2 * space.count)


def test_server_lr_scales_before_rounding() -> None:
    space = opened(model_of(), server_lr=3.0)
    state = space.apply(space.initial_state({}), {"amounts": np.full(space.count, 0.5)})
    assert state["amounts"][: space.count].tolist() == [2] * space.count  # 1.5, ties to even


def test_going_back_to_an_earlier_state_gives_the_same_weights() -> None:
    model = model_of()
    space = opened(model)
    first = space.apply(space.initial_state({}), {"amounts": np.full(space.count, 7.0)})
    space.apply(first, {"amounts": np.full(space.count, 9.0)})
    space.enter({}, first)
    other = model_of()
    opened(other).enter({}, first)
    pairs = zip(trainable_parameters(model).values(), trainable_parameters(other).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_updates_have_the_layout_that_the_space_announces() -> None:
    space = opened(model_of())
    state = space.initial_state({})
    space.enter({}, state)
    update = space.express({}, state)
    assert layout_of(update) == space.update_layout(layout_of(state))
    assert not update["amounts"].any()


def _nan(space: Projected, model: nn.Module, state: Arrays) -> None:
    next(iter(trainable_parameters(model).values())).detach().fill_(float("nan"))
    space.express({}, state)


REFUSED: list[tuple[Callable[[Projected, nn.Module, Arrays], object], type[Exception], str]] = [
    (_nan, UpdateError, "not finite"),
    (lambda s, m, state: s.apply(state, {"amounts": np.full(s.count, np.nan)}), UpdateError, "not finite"),
    (lambda s, m, state: s.apply(state, {"amounts": np.full(s.count, 2.0**52)}), UpdateError, "2.53"),
    (
        lambda s, m, state: s.check({"amounts": np.array([0, LARGEST + 1])}, state=state, who="c7"),
        UpdateError,
        "c7: amounts",
    ),
    (
        lambda s, m, state: s.check(
            {"amounts": np.array([-LARGEST])}, state={"amounts": np.array([2**53 - 2**30])}, who="c7"
        ),
        UpdateError,
        "c7: coefficients that add up to",
    ),
    (lambda s, m, state: s.enter({}, {**state, "next": np.array([5])}), ModelError, "4 rounds"),
    (
        lambda s, m, state: s.enter({}, {**state, "fingerprint": state["fingerprint"][::-1]}),
        ModelError,
        "nothing",
    ),
    (lambda s, m, state: s.route(state, 3, np.random.default_rng(0)), TrainingError, "seed-scalars"),
]


@pytest.mark.parametrize(("attempt", "kind", "words"), REFUSED)
def test_what_is_refused(attempt: Any, kind: type[Exception], words: str) -> None:
    model = model_of()
    space = opened(model)
    state = space.initial_state({})
    before = arrays_digest(state)
    with pytest.raises(kind, match=words):
        attempt(space, model, state)
    assert arrays_digest(space.initial_state({})) == before


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"training": {"kind": "zeroth-order"}}, "seed-scalars"),
        ({"stages": [{"kind": "clip", "clip_norm": 1.0}]}, "integers"),
        ({"federation": {"strategy": "fedavgm"}}, "another direction"),
        ({"evaluation": {"baselines": True}}, "fair comparison"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(keys: dict[str, Any], reason: str) -> None:
    assert reason in "\n".join(problems_of(run_of(**keys)))
    assert problems_of(run_of()) == []


def test_blocks_that_move_further_get_more_coefficients() -> None:
    """After a round in which one tensor alone moved, it has nearly all coefficients; their sum stays."""
    model = model_of()
    space = opened(model, allocation="norm", num_seeds=8)
    live = trainable_parameters(model)
    moved = sorted(live)[1]
    state = space.initial_state({})
    for _ in range(2):
        space.enter({}, state)
        with torch.no_grad():
            live[moved].add_(1e-2)
        state = applied(space, state, space.express({}, state))
    counts = {name: block.count for name, block in space._of_next_round().items()}
    assert sum(counts.values()) == space.count
    assert set(counts.values()) == {FEWEST, space.count - FEWEST * (len(live) - 1)}
    assert max(counts, key=lambda name: counts[name]) == moved
    error = (space._weights(moved) - opened(model_of())._weights(moved)).double()
    assert error.abs().sum() > 0


def test_counts_are_whole_shares_of_the_norms() -> None:
    assert count_shared(10, [3, 1]) == [2 + 5, 2 + 1]  # 4.5 and 1.5 of 6: the earlier one is rounded up
    assert count_shared(7, [0, 5, 0]) == [2, 3, 2]
    assert sum(count_shared(1001, [7**9, 3**20, 1, 0])) == 1001
    change = torch.from_numpy(np.random.default_rng(3).integers(-4000, 4000, 96))
    found = [
        squared_norm(PROJECTIONS["signs"](SEED, 0, 96, 64).coefficients(change, draw).tolist())
        for draw in range(200)
    ]
    # One estimate is off by sqrt(2 / 64) = 18 percent; the mean of 200 by 1.2 percent.
    assert np.mean(found) == pytest.approx(float(change.double().square().sum()), rel=0.06)


@pytest.mark.parametrize(
    "options",
    [{"direction_sets": 5}, {"allocation": "norm"}, {"allocation": "norm", "direction_sets": 3}],
)
def test_a_late_joiner_holds_the_same_bits_under_every_option(options: dict[str, Any]) -> None:
    rng = np.random.default_rng(2)
    server, veteran, late, client = (model_of() for _ in range(4))
    spaces = [opened(model, **options) for model in (server, veteran, late, client)]
    state = spaces[0].initial_state({})
    for _ in range(3):
        updates = []
        for _ in range(3):
            spaces[3].enter({}, state)
            shifted(client, rng)
            updates.append(spaces[3].express({}, state))
            spaces[0].check(updates[-1], state=state, who="c1")
            assert layout_of(updates[-1]) == spaces[0].update_layout(layout_of(state))
        state = applied(spaces[0], state, *updates)
        spaces[1].enter({}, state)
    spaces[2].enter({}, state)
    pairs = zip(trainable_parameters(veteran).values(), trainable_parameters(late).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_directions_of_their_own_bring_a_mean_nearer() -> None:
    """Eight equal changes: on common directions the mean is as far off as one, on their own nearer.

    sqrt(d / K) for one client; over n clients with directions of their own, sqrt(d / (n K)).
    """

    def off(sets: int) -> float:
        errors = []
        for trial in range(12):
            model = model_of()
            space = opened(model, direction_sets=sets, quantum_exponent=-30)
            state, live = space.initial_state({}), trainable_parameters(model)
            base = {name: parameter.detach().clone() for name, parameter in live.items()}
            rng, updates, wanted = np.random.default_rng(trial), [], {}
            noise = {name: 1e-2 * rng.standard_normal(tuple(base[name].shape)) for name in base}
            for client in range(8):
                space.enter({}, state)
                with torch.no_grad():
                    for name, parameter in live.items():
                        parameter.copy_(
                            base[name] + torch.from_numpy(noise[name]).float() * (1 + 1e-4 * client)
                        )
                        wanted[name] = noise[name]
                updates.append(space.express({}, state))
            space.enter({}, applied(space, state, *updates))
            errors += [
                np.square((live[name].detach() - base[name]).double().numpy() - wanted[name]).mean()
                / np.square(wanted[name]).mean()
                for name in base
            ]
        return float(np.mean(errors))

    assert off(64) < 0.3 * off(1)  # of the squares; 1/8, and a little more where two take the same set


def test_an_update_uses_one_set_of_directions() -> None:
    space = opened(model_of(), direction_sets=3)
    state = space.initial_state({})
    amounts = np.zeros(3 * space.count, dtype=np.int64)
    amounts[0] = amounts[-1] = 1
    with pytest.raises(UpdateError, match="c7: coefficients in 2 sets"):
        space.check({"amounts": amounts}, state=state, who="c7")


@pytest.mark.parametrize(
    ("space", "federation", "reason"),
    [
        ({"allocation": "norm", "projection": "srht"}, {}, "allocation 'size'"),
        ({"direction_sets": 4}, {"strategy": "fedmedian"}, "direction_sets = 1"),
    ],
)
def test_options_that_cannot_compose_are_refused(
    space: dict[str, Any], federation: dict[str, Any], reason: str
) -> None:
    assert reason in "\n".join(problems_of(run_of(space=space, federation=federation)))
    assert problems_of(run_of(space={**space, "projection": "signs"}, federation={})) == []
