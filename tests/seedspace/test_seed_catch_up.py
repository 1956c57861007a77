"""Any model, any history, any machine: the integers alone decide the bits."""

from collections.abc import Callable, Iterable
from fractions import Fraction
from random import Random

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedpeft.seedspace import space as space_module
from fedpeft.seedspace.digest import digest
from fedpeft.seedspace.layout import CounterStream
from fedpeft.seedspace.space import SeedSpace
from fedpeft.seedspace.state import SeedState
from fedpeft.seedspace.trainable_tensors import trainable_parameters, trainable_shapes

SignsOf = Callable[[int, int, int, int, int, Iterable[int]], list[int]]
K, EXPONENT = 24, -16
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Language(nn.Module):
    """An embedding, a norm and a head that may be the embedding's own table."""

    def __init__(self, vocabulary: int, width: int, *, tied: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=not tied)
        if tied:
            self.head.weight = self.table.weight


def model_of(vocabulary: int, width: int, tied: bool, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(vocabulary * 100 + width)
    return Language(vocabulary, width, tied=tied).to(dtype)


def amounts_of(seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(-99, 100, K))


@settings(deadline=None, max_examples=12)
@given(
    st.integers(1, 70),
    st.integers(1, 40),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.integers(0, 2**64 - 1),
    st.lists(st.integers(0, 999), min_size=2, max_size=5),
    st.randoms(use_true_random=False),
)
def test_everyone_reaches_one_digest(
    vocabulary: int,
    width: int,
    tied: bool,
    dtype: torch.dtype,
    seed: int,
    rounds: list[int],
    random: Random,
) -> None:
    """A veteran on two threads, one without compiled code who missed a round, one who starts at the end."""
    models = [model_of(vocabulary, width, tied, dtype) for _ in range(3)]
    space = SeedSpace(CounterStream(seed), K, EXPONENT, trainable_shapes(models[0]))
    bases = [{n: p.detach().clone() for n, p in trainable_parameters(model).items()} for model in models]
    veteran, other = SeedState(space, bases[0]), SeedState(space, bases[1])
    changes = [amounts_of(number) for number in rounds]
    for change in changes:
        veteran.advance(change, threads=2)
    missed = random.randrange(len(changes) - 1)
    joined = [*changes[:missed], changes[missed] + changes[missed + 1], *changes[missed + 2 :]]
    random.shuffle(joined)
    for change in joined:
        other.advance(change, backend="torch")
    for state, model in ((veteran, models[0]), (other, models[1])):
        state.write(trainable_parameters(model))
    space.replay(bases[2], veteran.amounts, trainable_parameters(models[2]), threads=3)
    assert len({digest(dict(model.named_parameters())) for model in models}) == 1
    if tied:
        assert all(
            model.get_parameter("table.weight") is model.get_submodule("head").weight for model in models
        )


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 30), st.integers(1, 30), st.booleans(), st.integers(0, 2**64 - 1), st.data())
def test_each_weight_is_the_exact_sum_rounded_once(
    signs_of: SignsOf, vocabulary: int, width: int, tied: bool, seed: int, data: st.DataObject
) -> None:
    """In rationals; numpy finds the nearest float32 to the float64, which is exact for quanta of 2^-16."""
    model = model_of(vocabulary, width, tied, torch.float32)
    live = trainable_parameters(model)
    base = {name: parameter.detach().clone() for name, parameter in live.items()}
    amounts = amounts_of(vocabulary)
    SeedSpace(CounterStream(seed), K, EXPONENT, trainable_shapes(model)).replay(base, amounts, live)
    rank, name = data.draw(st.sampled_from(list(enumerate(sorted(live)))))
    place = data.draw(st.integers(0, base[name].numel() - 1))
    total = sum(
        amount * signs_of(seed, 0, 0, rank, k, [place])[0] for k, amount in enumerate(amounts.tolist())
    )
    exact = Fraction(float(base[name].view(-1)[place])) + Fraction(total, 2**-EXPONENT)
    assert Fraction(float(exact)) == exact
    assert live[name].detach().view(-1)[place].item() == float(np.float32(float(exact)))


def test_tensors_beyond_one_chunk_are_cut_without_a_trace() -> None:
    size = space_module.chunk_of(torch.device("cpu")) + 131
    space = SeedSpace(CounterStream(5), 3, EXPONENT, {"w": (size,)})
    base, amounts = {"w": torch.linspace(-1, 1, size)}, torch.tensor([7, 0, -90])
    state = SeedState(space, base)
    state.advance(amounts, threads=2)
    into = {"w": torch.empty(size)}
    space.replay(base, amounts, into)
    assert digest(into) == state.fingerprint()
    edge = slice(size - 140, size)
    alone = SeedSpace(CounterStream(5), 3, EXPONENT, {"w": (size,)})
    torch_only = {"w": torch.empty(size)}
    alone.replay(base, amounts, torch_only, backend="torch")
    assert torch_only["w"][edge].equal(into["w"][edge])
    assert digest(torch_only) == digest(into)
