"""Seed-scalars as a space: the state is integers, and integers alone rebuild the weights."""

from __future__ import annotations

from fractions import Fraction
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedpeft.aggregation.exact_sum import ExactSum
from fedpeft.config.run_file import build_run
from fedpeft.config.sections import PeftSection, RunConfig, SpaceSection
from fedpeft.errors import ModelError, RunFileError, TrainingError, UpdateError
from fedpeft.models.attach import attach
from fedpeft.models.trainable import trainable_parameters
from fedpeft.seedspace.trainable_tensors import trainable_parameters as canonical
from fedpeft.spaces import Space, Trail, build_space, space_options
from fedpeft.spaces.seed_modes import CommonDirections, FixedSeeds, WeightedSeeds, round_to_integers
from fedpeft.spaces.seed_scalars import LARGEST, SeedScalars
from fedpeft.updates.update import Arrays, Update, arrays_digest, layout_of
from fedpeft.wire.codec import Envelope, encode
from tests.models.tiny import tiny_base
from tests.spaces.oracles import weight

SEED = 2**40 + 7  # both halves of the key are in use


def run_of(**space: Any) -> RunConfig:
    tables = {
        "run": {"name": "seeds", "rounds": 3, "seed": SEED},
        "peft": {"method": "full"},
        "training": {"kind": "zeroth-order", "lr": 1e-3, "steps": 4},
        "space": {"kind": "seed-scalars", "num_seeds": 8, **space},
    }
    return build_run(tables, source="test")


def model_of(method: str = "full") -> nn.Module:
    return attach(tiny_base("llama"), PeftSection(method=method), task="causal-lm", seed=0)


def opened(model: nn.Module, **space: Any) -> SeedScalars:
    result = build_space(run_of(**space), model)
    assert isinstance(result, SeedScalars)
    return result


def moved(space: Space, state: Arrays, amounts: list[int]) -> Arrays:
    return space.apply(state, {"amounts": np.array(amounts, dtype=np.float64)})


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in canonical(model).items()}


def test_weights_are_the_formula_on_every_tensor() -> None:
    model = model_of()
    start = weights(model)
    space = opened(model)
    amounts = [3, -700, 0, 12_345, -1, 0, 2**20, 5]
    space.enter(trainable_parameters(model), moved(space, space.initial_state({}), amounts))
    rng = np.random.default_rng(0)
    for number, (name, now) in enumerate(sorted(weights(model).items())):
        for place in rng.integers(0, now.numel(), 6).tolist():
            expected = weight(
                float(start[name].view(-1)[place]),
                amounts,
                space.space.exponent,
                seed=SEED,
                tensor_id=number,
                place=place,
            )
            assert now.view(-1)[place].numpy() == expected, (name, place)


def test_the_quantum_is_256_times_finer_than_the_learning_rate() -> None:
    exponent = opened(model_of()).space.exponent
    assert 2.0**exponent <= 1e-3 / 256 < 2.0 ** (exponent + 1)
    assert opened(model_of(), quantum_exponent=-20).space.exponent == -20


@settings(max_examples=10, deadline=None)
@given(st.lists(st.lists(st.integers(-5000, 5000), min_size=8, max_size=8), min_size=1, max_size=4))
def test_late_joiner_and_veteran_hold_the_same_bits(changes: list[list[int]]) -> None:
    server, veteran, late = (model_of("ln-tuning") for _ in range(3))
    spaces = [opened(model) for model in (server, veteran, late)]
    state = spaces[0].initial_state({})
    for change in changes:
        state = moved(spaces[0], state, change)
        spaces[1].enter({}, state)
    spaces[2].enter({}, state)
    assert all(
        torch.equal(a, b) for a, b in zip(weights(veteran).values(), weights(late).values(), strict=True)
    )
    summed = np.sum(np.array(changes), axis=0)
    assert np.array_equal(state["amounts"], summed)


def test_the_state_does_not_depend_on_what_the_space_saw_before() -> None:
    one, two = opened(model_of()), opened(model_of())
    far = moved(one, one.initial_state({}), [9] * 8)
    moved(one, far, [1] * 8)
    states = [moved(space, space.initial_state({}), [0, 4, 0, -4, 0, 0, 0, 1]) for space in (one, two)]
    assert arrays_digest(states[0]) == arrays_digest(states[1])


def test_another_base_is_refused_before_training() -> None:
    space = opened(model_of())
    state = space.initial_state({})
    other = model_of()
    with torch.no_grad():
        next(iter(trainable_parameters(other).values())).view(-1)[3] += 1e-6
    with pytest.raises(ModelError, match="nothing was trained"):
        opened(other).enter(trainable_parameters(other), state)


def test_a_state_whose_fingerprint_was_altered_is_refused() -> None:
    model = model_of()
    space = opened(model)
    state = dict(space.initial_state({}))
    space.enter({}, state)
    state["fingerprint"] = np.array(state["fingerprint"]) ^ 1
    with pytest.raises(ModelError, match="fingerprint"):
        space.enter({}, state)


def test_amounts_that_would_overflow_are_refused_and_change_nothing() -> None:
    model = model_of("ln-tuning")
    space = opened(model)
    state = moved(space, space.initial_state({}), [2**28] * 7 + [2**28 - 1])  # sum 2^31 - 1
    before = arrays_digest(state)
    with pytest.raises(UpdateError, match="quantum_exponent"):
        moved(space, state, [1] + [0] * 7)
    assert arrays_digest(moved(space, state, [0] * 8)) == before


@pytest.mark.parametrize("bad", [LARGEST + 1, -LARGEST - 1, -(2**63)])
def test_scalars_out_of_the_agreed_range_are_refused(bad: int) -> None:
    space = opened(model_of("ln-tuning"))
    amounts = np.array([0, 0, bad, 0, 0, 0, 0, 0], dtype=np.int64)
    with pytest.raises(UpdateError, match=r"ward-3: amounts\[2\] is"):
        space.check({"amounts": amounts}, state=space.initial_state({}), who="ward-3")
    honest = {"amounts": np.array([LARGEST, -LARGEST, 0, 0, 0, 0, 0, 0])}
    space.check(honest, state=space.initial_state({}), who="ward-3")


@pytest.mark.parametrize("name", ["magnitudes", "visits"])
def test_sizes_and_counts_below_zero_are_refused(name: str) -> None:
    """They would make the next rounds' probabilities negative, or divide by zero."""
    space = opened(model_of("ln-tuning"), mode="fedkseed-pro")
    arrays = {each: np.zeros(8, dtype=np.int64) for each in ("amounts", "magnitudes", "visits")}
    space.check(arrays, state=space.initial_state({}), who="ward-3")
    arrays[name][5] = -1
    with pytest.raises(UpdateError, match=rf"ward-3: {name}\[5\] is -1; the agreed range is 0 to"):
        space.check(arrays, state=space.initial_state({}), who="ward-3")


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 60), st.integers(1, 5), st.integers(1, 5))
def test_what_check_lets_through_never_overflows_in_a_mean(spare: int, one: int, other: int) -> None:
    """Sums of magnitudes up to 2^31 - 1 are exact; 8 seeds may be rounded up by half a quantum each."""
    space = opened(model_of("ln-tuning"))
    state = moved(space, space.initial_state({}), [2**28] * 7 + [2**28 - 1 - spare])
    clients = [np.array([1, -1, 1, 1, -1, 1, 1, 1]) * one, np.array([1, 1, 1, 1, -1, 1, 1, 1]) * other]
    passed = []
    for amounts in clients:
        if 8 * int(abs(amounts[0])) <= spare - 8:
            space.check({"amounts": amounts}, state=state, who="ward-3")
            passed.append(amounts)
        else:
            with pytest.raises(UpdateError, match="ward-3: scalars that add up to"):
                space.check({"amounts": amounts}, state=state, who="ward-3")
    if passed:
        moved(space, state, list(np.mean(passed, axis=0)))


def test_max_scalar_narrows_the_range() -> None:
    run = run_of(quantum_exponent=-20)
    training = run.training.model_copy(update={"max_scalar": 2.0, "lr": 2.0**-10, "steps": 5, "queries": 3})
    space = build_space(run.model_copy(update={"training": training}), model_of("ln-tuning"))
    assert isinstance(space, SeedScalars)
    assert space.largest == 5 * 3 * 2 * 2**10


@pytest.mark.parametrize("value", [np.nan, np.inf, 2.0**53])
def test_what_is_no_integer_is_refused(value: float) -> None:
    space = opened(model_of("ln-tuning"))
    with pytest.raises(UpdateError, match="stays as it was"):
        space.apply(space.initial_state({}), {"amounts": np.array([value] + [0.0] * 7)})


def test_rounding_is_to_nearest_with_ties_to_even() -> None:
    assert round_to_integers(np.array([0.5, 1.5, -0.5, -1.5, 2.4999, -7.5001])).tolist() == [
        0,
        2,
        0,
        -2,
        2,
        -8,
    ]


def test_wrong_number_of_seeds_is_refused() -> None:
    space = opened(model_of("ln-tuning"))
    state = dict(space.initial_state({}))
    state["amounts"] = np.zeros(9, dtype=np.int64)
    with pytest.raises(ModelError, match="same"):
        space.enter({}, state)


class TestModes:
    """What clients visit and what is kept, by hand."""

    def test_an_update_is_the_visits_summed_by_seed(self) -> None:
        trail = Trail(np.array([3, 1, 3, 0]), np.array([10, -4, 7, 2]))
        mode = FixedSeeds(5)
        assert mode.express({}, trail)["amounts"].tolist() == [2, -4, 0, 17, 0]
        assert dict(mode.layout()) == {"amounts": ((5,), "<i8")}

    def test_uniform_visits_reach_every_seed_equally(self) -> None:
        visits = FixedSeeds(8).directions({}, 80_000, np.random.default_rng(0))
        counts = np.bincount(visits, minlength=8)
        # chi-square with 7 degrees of freedom exceeds 29.9 with probability 1e-4
        assert ((counts - 10_000) ** 2 / 10_000).sum() < 29.9

    def test_pro_keeps_sizes_and_visits(self) -> None:
        mode = WeightedSeeds(4, clip=100)
        trail = Trail(np.array([2, 2, 0]), np.array([60, -500, -7]))
        arrays = mode.express({}, trail)
        assert arrays["amounts"].tolist() == [-7, 0, -440, 0]
        assert arrays["magnitudes"].tolist() == [7, 0, 160, 0]
        assert arrays["visits"].tolist() == [1, 0, 2, 0]

    def test_pro_probabilities_are_the_softmax_of_scaled_amplitudes(self) -> None:
        mode = WeightedSeeds(3, clip=100)
        seen = {name: np.array(values, dtype=float) for name, values in (
            ("amounts", [0, 0, 0]), ("magnitudes", [30, 0, 50]), ("visits", [2, 0, 4]))}  # fmt: skip
        state = mode.apply(mode.start(), seen)
        amplitude = [Fraction(30, 3), Fraction(0), Fraction(50, 5)]  # one further zero each
        assert amplitude[0] == amplitude[2] == 10
        e = np.e
        assert np.allclose(mode.probabilities(state), [e / (2 * e + 1), 1 / (2 * e + 1), e / (2 * e + 1)])

    @pytest.mark.parametrize("clients", [1, 4, 10])
    def test_pro_probabilities_are_the_published_ones_of_all_raw_scalars(self, clients: int) -> None:
        """From every client's scalars one by one, as the published server keeps them."""
        mode, generator = WeightedSeeds(32, clip=10**6, cohort=clients), np.random.default_rng(7)
        state, history = mode.start(), {seed: [0.0] for seed in range(32)}
        for _ in range(3):
            sums: dict[str, np.ndarray] = {name: np.zeros(32) for name in state}
            for _ in range(clients):
                trail = Trail(generator.integers(0, 32, 12), generator.integers(-5000, 5000, 12))
                for seed, scalar in zip(trail.directions.tolist(), trail.amounts.tolist(), strict=True):
                    history[seed].append(abs(scalar))
                for name, array in mode.express(state, trail).items():
                    sums[name] += array / clients
            state = mode.apply(state, sums)
        amplitude = np.array([np.mean(history[seed]) for seed in range(32)])
        share = (amplitude - amplitude.min()) / (amplitude.max() - amplitude.min())
        published = np.exp(share) / np.exp(share).sum()
        assert np.allclose(mode.probabilities(state), published, rtol=5e-3)

    def test_pro_starts_uniform(self) -> None:
        mode = WeightedSeeds(5, clip=100)
        assert np.allclose(mode.probabilities(mode.start()), 0.2)

    def test_common_directions_are_fresh_in_every_round(self) -> None:
        mode = CommonDirections(3, rounds=2)
        state: Arrays = mode.start()
        rng = np.random.default_rng(0)
        assert mode.directions(state, 6, rng).tolist() == [0, 1, 2, 0, 1, 2]
        state = mode.apply(state, {"amounts": np.array([1.0, 2.0, 3.0])})
        assert mode.directions(state, 3, rng).tolist() == [3, 4, 5]
        assert mode.express(state, Trail(np.array([3, 5]), np.array([7, 9])))["amounts"].tolist() == [7, 0, 9]
        state = mode.apply(state, {"amounts": np.array([4.0, 5.0, 6.0])})
        assert state["amounts"].tolist() == [1, 2, 3, 4, 5, 6]
        with pytest.raises(TrainingError, match="direction 6"):
            mode.directions(state, 3, rng)

    def test_common_directions_are_visited_equally_often(self) -> None:
        with pytest.raises(TrainingError, match="multiple"):
            CommonDirections(3, rounds=2).directions(
                CommonDirections(3, 2).start(), 4, np.random.default_rng(0)
            )


@pytest.mark.parametrize("mode", ["fedkseed", "fedkseed-pro", "common"])
def test_updates_have_the_layout_that_the_space_announces(mode: str) -> None:
    model = model_of("ln-tuning")
    space = opened(model, mode=mode)
    state = space.initial_state({})
    route = space.route(state, 8, np.random.default_rng(0))
    trail = Trail(route.directions, np.arange(8))
    assert layout_of(space.express({}, state, trail)) == space.update_layout(layout_of(state))
    assert not any(array.any() for array in space.express({}, state).values())


def test_unknown_options_are_refused() -> None:
    with pytest.raises(RunFileError, match="unknown option"):
        space_options(SpaceSection.model_validate({"kind": "seed-scalars", "seeds": 3}))
    with pytest.raises(RunFileError, match=r"space\.mode"):
        space_options(SpaceSection.model_validate({"kind": "seed-scalars", "mode": "pro"}))


@pytest.mark.parametrize("mode", ["fedkseed", "fedkseed-pro", "common"])
def test_messages_of_the_published_size_take_a_kilobyte_up_and_eight_down(mode: str) -> None:
    run = run_of(mode=mode, num_seeds=200 if mode == "common" else 4096)
    space = build_space(run, model_of("ln-tuning"))
    start = space.initial_state({})
    state, update = space.example(start, 200, np.random.default_rng(0))
    assert layout_of(state) == layout_of(start)
    assert layout_of(update) == space.update_layout(layout_of(start))
    sizes = [
        len(encode(Envelope(arrays, "0" * 64, 1, "0" * 64, space.kind, base_digest="0" * 64)))
        for arrays in (update, state)
    ]
    if mode != "fedkseed-pro":  # which sends three vectors
        assert sizes[0] <= 1024
        assert sizes[1] <= 8192
    assert min(sizes) > 200


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.lists(st.integers(-LARGEST, LARGEST), min_size=8, max_size=8), min_size=2, max_size=5),
    st.lists(st.integers(1, 2**20), min_size=5, max_size=5),
    st.randoms(use_true_random=False),
)
def test_the_order_of_clients_leaves_no_trace(
    clients: list[list[int]], weights_of: list[int], random: Random
) -> None:
    """Weighted means of any integers: the same state, fingerprint included, whoever answers first."""
    space = opened(model_of("ln-tuning"))
    start = space.initial_state({})
    layout = space.update_layout(layout_of(start))
    updates = [
        Update({"amounts": np.array(client, dtype=np.int64)}, weight)
        for client, weight in zip(clients, weights_of, strict=False)
    ]
    digests = set()
    for _ in range(3):
        total = ExactSum(layout, quantum_exponent=-36, capacity=len(updates))
        for update in updates:
            total.fold(update)
        digests.add(arrays_digest(space.apply(start, total.mean())))
        random.shuffle(updates)
    assert len(digests) == 1
