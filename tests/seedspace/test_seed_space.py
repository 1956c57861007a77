"""What a federation relies on: one history-free state, the same bits for everyone."""

from collections.abc import Callable, Iterable
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import ModelError, UpdateError
from fedpeft.seedspace.digest import digest
from fedpeft.seedspace.layout import CounterStream
from fedpeft.seedspace.project import exponent_for, quantise
from fedpeft.seedspace.space import SeedSpace
from fedpeft.seedspace.state import SeedState

SignsOf = Callable[[int, int, int, int, int, Iterable[int]], list[int]]
Named = dict[str, torch.Tensor]
SHAPES = {"b.weight": (7, 33), "a.weight": (300,), "c.bias": (1,)}
K = 40


def random_base(dtype: torch.dtype = torch.float32) -> Named:
    generator = torch.Generator().manual_seed(4)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def empty(base: Named) -> Named:
    return {name: torch.full_like(tensor, float("nan")) for name, tensor in base.items()}


def amounts_of(seed: int, largest: int = 50) -> torch.Tensor:
    return torch.randint(-largest, largest, (K,), generator=torch.Generator().manual_seed(seed))


SPACE = SeedSpace(CounterStream(77), K, -14, SHAPES)


def test_replay_is_the_formula(signs_of: SignsOf) -> None:
    base, amounts = random_base(), amounts_of(1)
    into = empty(base)
    SPACE.replay(base, amounts, into)
    for rank, name in enumerate(sorted(SHAPES)):
        size = base[name].numel()
        rows = [signs_of(77, 0, 0, rank, k, range(size)) for k in range(K)]
        sums = (amounts.double() @ torch.tensor(rows, dtype=torch.float64)).reshape(SHAPES[name])
        assert into[name].equal((base[name].double() + sums * 2.0**-14).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_backends_and_threads_reach_one_digest(dtype: torch.dtype) -> None:
    base = random_base(dtype)
    digests = set()
    for backend, threads in [("numba", 1), ("numba", 2), ("torch", 1)]:
        into = empty(base)
        SPACE.replay(base, amounts_of(2), into, backend=backend, threads=threads)
        digests.add(digest(into))
    assert len(digests) == 1


def test_replay_in_place_equals_replay_beside() -> None:
    base, into = random_base(), empty(random_base())
    SPACE.replay(base, amounts_of(3), into)
    SPACE.replay(base, amounts_of(3), base)
    assert digest(base) == digest(into)


@settings(deadline=None, max_examples=8)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_veteran_shuffled_and_late_joiner_agree(seeds: list[int], shuffle: Random) -> None:
    """A veteran adds round by round, another in other order, one catches up at once, one replays A alone."""
    rounds = [amounts_of(seed) for seed in seeds]
    veteran, other, returning = (SeedState(SPACE, random_base()) for _ in range(3))
    for difference in rounds:
        veteran.advance(difference)
    shuffle.shuffle(rounds)
    for difference in rounds:
        other.advance(difference, backend="torch")
    returning.advance(rounds[0])
    returning.advance(veteran.amounts - returning.amounts)
    late = empty(random_base())
    SPACE.replay(random_base(), veteran.amounts, late)
    assert {state.fingerprint() for state in (veteran, other, returning)} == {digest(late)}


def test_there_and_back_leaves_no_trace() -> None:
    state = SeedState(SPACE, random_base())
    start = state.fingerprint()
    state.advance(amounts_of(5))
    moved = state.fingerprint()
    state.advance(-amounts_of(5))
    assert state.fingerprint() == start == digest(random_base())
    assert moved != start


def test_an_overflowing_advance_is_refused_and_changes_nothing() -> None:
    state = SeedState(SPACE, random_base())
    state.advance(amounts_of(6))
    before, amounts = state.fingerprint(), state.amounts.clone()
    with pytest.raises(UpdateError, match=r"2\^31"):
        state.advance(torch.full((K,), 2**26))
    assert state.fingerprint() == before
    assert state.amounts.equal(amounts)


def test_projection_sums_over_tensors(signs_of: SignsOf) -> None:
    generator = torch.Generator().manual_seed(8)
    delta = {n: torch.randint(-99, 99, s, generator=generator) for n, s in SHAPES.items()}
    which = torch.tensor([5, 0, 39])
    expected = [0, 0, 0]
    for rank, name in enumerate(sorted(SHAPES)):
        flat = delta[name].flatten().tolist()
        for place, k in enumerate(which.tolist()):
            signs = signs_of(77, 0, 0, rank, k, range(len(flat)))
            expected[place] += sum(s * d for s, d in zip(signs, flat, strict=True))
    assert SPACE.project(delta, which).tolist() == expected
    assert SPACE.project(delta, which, backend="torch", threads=2).tolist() == expected


def test_digests_see_names_types_shapes_and_bits() -> None:
    base = torch.arange(6, dtype=torch.float32)
    variants = [
        {"a": base},
        {"b": base},
        {"a": base.double()},
        {"a": base.reshape(2, 3)},
        {"a": base, "b": base},
        {"a": torch.where(base == 0, -0.0, base)},
    ]
    assert len({digest(tensors) for tensors in variants}) == len(variants)
    assert digest({"a": base, "b": base}) == digest({"b": base, "a": base})
    assert digest({"a": torch.zeros(())}) != digest({"a": torch.zeros(0)})


class TestQuantise:
    def test_rounds_to_nearest_ties_to_even(self) -> None:
        values = torch.tensor([0.5, 1.5, -0.5, 0.75, -2.25]) * 2.0**-10
        assert quantise(values, -10).tolist() == [0, 2, 0, 1, -2]

    def test_quanta_beyond_single_precision(self) -> None:
        assert quantise(torch.tensor([3 * 2.0**-300], dtype=torch.float64), -300).tolist() == [3]

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), 2.0**53])
    def test_refuses_what_does_not_fit(self, value: float) -> None:
        with pytest.raises(UpdateError, match="not finite or exceed"):
            quantise(torch.tensor([1.0, value]), 0)

    @pytest.mark.parametrize("largest", [1.0, 0.9999, 1e-12, 123.456])
    def test_exponent_for_uses_all_bits(self, largest: float) -> None:
        exponent = exponent_for(largest, 15)
        units = int(quantise(torch.tensor([largest], dtype=torch.float64), exponent))
        assert 2**14 <= units <= 2**15

    @pytest.mark.parametrize("largest", [float("nan"), float("inf"), -1.0])
    def test_exponent_for_refuses_nonsense(self, largest: float) -> None:
        with pytest.raises(UpdateError, match="largest magnitude"):
            exponent_for(largest, 8)


class TestRefusals:
    def test_a_missing_or_misshapen_tensor(self) -> None:
        base = random_base()
        with pytest.raises(ModelError, match="shape"):
            SPACE.replay({**base, "a.weight": torch.zeros(299)}, amounts_of(1), empty(base))
        del base["a.weight"]
        with pytest.raises(ModelError, match="missing"):
            SPACE.replay(base, amounts_of(1), base)

    def test_another_number_of_amounts(self) -> None:
        with pytest.raises(UpdateError, match="K = 40"):
            SPACE.check_amounts(torch.zeros(41, dtype=torch.int64))

    def test_spaces_that_are_none(self) -> None:
        with pytest.raises(ModelError, match="no tensors"):
            SeedSpace(CounterStream(0), 1, 0, {})
        with pytest.raises(UpdateError, match="seeds"):
            SeedSpace(CounterStream(0), 0, 0, SHAPES)
        with pytest.raises(UpdateError, match="out of range"):
            SeedSpace(CounterStream(0), 1, -2000, SHAPES)

    def test_a_delta_that_could_overflow_over_all_tensors(self) -> None:
        delta = {name: torch.full(shape, 2**53) for name, shape in SHAPES.items()}
        with pytest.raises(UpdateError, match="coarser"):
            SPACE.project(delta, torch.arange(3))
