"""Directions that don't move everything, against definitions in plain Python and NumPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedpeft.config.sections import PeftSection
from fedpeft.models.attach import attach
from fedpeft.seedspace.accumulate import accumulate
from fedpeft.seedspace.jit_perturb import JustInTime
from fedpeft.seedspace.layout import CounterStream, Span, tensor_ids
from fedpeft.seedspace.perturb import perturb, perturb_rows
from fedpeft.seedspace.project import project
from fedpeft.seedspace.space import SeedSpace
from fedpeft.seedspace.state import SeedState
from fedpeft.seedspace.support import Support
from fedpeft.seedspace.supports import (
    Masked,
    OneBlock,
    SomeTensors,
    block_of_names,
    lowest_blocks,
    one_block,
    smallest_weights,
)
from fedpeft.seedspace.trainable_tensors import materialise, trainable_parameters, trainable_shapes
from tests.models.tiny import batch, tiny_base
from tests.spaces.oracles import _philox, sign

SEED = 2**33 + 11
SIZE = 300
MASK = torch.from_numpy(np.random.default_rng(0).random(SIZE) < 0.3)


def z(direction: int, tensor: int = 0, size: int = SIZE) -> torch.Tensor:
    return torch.tensor([sign(SEED, tensor, direction, place) for place in range(size)])


def masked() -> CounterStream:
    return CounterStream(SEED, support=Masked({0: MASK}, "d"))


def test_a_mask_zeroes_the_coordinates_it_leaves_out() -> None:
    directions, amounts = torch.tensor([4, 9]), torch.tensor([3, -5])
    expected = (3 * z(4) - 5 * z(9)) * MASK
    assert torch.equal(accumulate(masked(), Span(0, 0, SIZE), directions, amounts), expected)
    part = accumulate(masked(), Span(0, 130, 290), directions, amounts)
    assert torch.equal(part, expected[130:290])
    delta = torch.arange(SIZE)
    dots = [int((delta * z(k) * MASK).sum()) for k in (4, 9)]
    assert project(masked(), Span(0, 0, SIZE), directions, delta).tolist() == dots


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_weights_keep_their_bits(dtype: torch.dtype) -> None:
    weights = torch.linspace(-1, 1, SIZE).to(dtype)
    weights[~MASK] = -0.0  # a sum with zero would lose the sign
    out = perturb(masked(), 0, 4, weights, 0.25)
    wanted = (weights.float() + 0.25 * z(4)).to(dtype)
    assert torch.equal(out[MASK], wanted[MASK])
    assert torch.equal(out[~MASK].signbit(), weights[~MASK].signbit())
    assert torch.equal(out[~MASK], weights[~MASK])
    same = weights.clone()
    assert torch.equal(perturb(masked(), 0, 4, same, 0.25, out=same), out)


def test_masked_rows_of_a_table() -> None:
    table, rows = torch.linspace(-1, 1, SIZE).view(30, 10), torch.tensor([7, 2, 29])
    whole = perturb(masked(), 0, 4, table, 0.5)
    assert torch.equal(perturb_rows(masked(), 0, 4, table, rows, 0.5), whole[rows])


def test_each_direction_chooses_its_block_by_the_public_generator() -> None:
    support = OneBlock(SEED, {0: 0, 1: 1, 2: 2}, 3)
    directions = torch.arange(200)
    purpose = 5  # CHOICE
    expected = [_philox((0, SEED // 2**32, 0, purpose * 2**24), (k, SEED % 2**32))[0] % 3 for k in range(200)]
    assert support.choose_blocks(directions).tolist() == expected
    assert [int(support.choose_blocks(torch.tensor([k]))) for k in range(200)] == expected
    assert set(expected) == {0, 1, 2}
    assert support.moves(1, directions).tolist() == [block == 1 for block in expected]


def test_directions_of_other_blocks_move_nothing() -> None:
    support = OneBlock(SEED, {0: 0, 1: 1}, 2)
    chosen = support.choose_blocks(torch.arange(8)).tolist()
    stream = CounterStream(SEED, support=support)
    for tensor in (0, 1):
        expected = torch.zeros(SIZE, dtype=torch.int64)
        for k in range(8):
            expected += (k + 1) * z(k, tensor) * (chosen[k] == tensor)
        sums = accumulate(stream, Span(tensor, 0, SIZE), torch.arange(8), torch.arange(1, 9))
        assert torch.equal(sums, expected)
        dots = project(stream, Span(tensor, 0, SIZE), torch.arange(8), torch.arange(SIZE))
        assert [bool(dot) for dot in dots] == [block == tensor for block in chosen]
        still = next(k for k in range(8) if chosen[k] != tensor)
        weights = torch.randn(SIZE, generator=torch.Generator().manual_seed(1))
        assert torch.equal(perturb(stream, tensor, still, weights, 1.0), weights)


def tied(method: str = "full") -> nn.Module:
    return attach(tiny_base("llama"), PeftSection(method=method), task="causal-lm", seed=0)


CHOICES: dict[str, Callable[[nn.Module], Support]] = {
    "mask": lambda model: smallest_weights(model, 0.25),
    "block": lambda model: one_block(model, SEED),
}


@pytest.mark.parametrize("name", sorted(CHOICES))
def test_replay_and_forward_agree_with_perturbed_copies(name: str) -> None:
    model, choose = tied(), CHOICES[name]
    stream = CounterStream(SEED, support=choose(model))
    space = SeedSpace(stream, 6, -10, trainable_shapes(model))
    base = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}
    amounts = torch.tensor([1, -2, 0, 4, 0, 3])
    replayed = {name: torch.empty_like(tensor) for name, tensor in base.items()}
    space.replay(base, amounts, replayed)
    veteran = SeedState(space, base)
    for k in (3, 0, 5, 1):
        veteran.advance(torch.where(torch.arange(6) == k, amounts, 0))
    kept = {name: torch.empty_like(tensor) for name, tensor in base.items()}
    veteran.write(kept)
    for key, tensor in base.items():
        expected = tensor.double()
        for k, amount in enumerate(amounts.tolist()):
            moved = perturb(stream, space.ids[key], k, torch.zeros_like(tensor), 1.0)
            expected = expected + amount * 2.0**-10 * moved.double()
        assert torch.equal(replayed[key], expected.float())
        assert torch.equal(kept[key], replayed[key])
    ids = batch("llama")["input_ids"]
    with torch.no_grad():
        copies = materialise(model, space.ids, stream, 3, 0.01)
        wanted = torch.func.functional_call(model, copies, args=(), kwargs={"input_ids": ids}).logits
        with JustInTime(model, space.ids, stream).at(3, 0.01):
            found = model(input_ids=ids).logits
    assert torch.allclose(found, wanted, atol=1e-5)
    assert not torch.allclose(found, model(input_ids=ids).logits, atol=1e-3)


def test_the_mask_is_the_smallest_share_with_ties_in_order() -> None:
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, -1.0, 0.5, -0.5], [0.5, 2.0, -4.0, 1.0]]))
        model.bias.zero_()
    support = smallest_weights(model, 0.5)
    ids = tensor_ids(["weight", "bias"])
    assert support.mask(ids["weight"]).tolist() == [False, True, True, True, True, False, False, False]
    assert support.mask(ids["bias"]).tolist() == [True, False]
    assert smallest_weights(model, 0.01).mask(ids["weight"]).sum() == 1


def test_the_digest_knows_the_mask() -> None:
    model = tied("ln-tuning")
    digests = [smallest_weights(model, density).digest for density in (0.25, 0.25, 0.5)]
    assert digests[0] == digests[1] != digests[2]
    with torch.no_grad():
        first = next(iter(trainable_parameters(model).values()))
        first[first.abs().argmin()] = 10.0
    assert smallest_weights(model, 0.25).digest != digests[0]


def test_blocks_are_layers_and_tied_weights_lie_below() -> None:
    blocks = block_of_names(tied())
    assert {blocks[name] for name in blocks if ".layers.0." in name} == {1}
    assert {blocks[name] for name in blocks if ".layers.1." in name} == {2}
    rest = {name: block for name, block in blocks.items() if ".layers." not in name}
    assert {block for name, block in rest.items() if ".norm." in name} == {3}
    assert {block for name, block in rest.items() if ".norm." not in name} == {0}  # embedding, tied head
    assert len(rest) == 2


def test_the_lowest_blocks() -> None:
    model = tied()
    blocks, ids = block_of_names(model), tensor_ids(trainable_parameters(model))
    assert lowest_blocks(model, 1).ids == {ids[name] for name, block in blocks.items() if block <= 1}
    support = SomeTensors(frozenset({0}))
    stream = replace(CounterStream(SEED), support=support)
    assert torch.equal(perturb(stream, 1, 0, torch.zeros(5), 1.0), torch.zeros(5))
    assert torch.equal(perturb(stream, 0, 0, torch.zeros(5), 1.0), z(0, size=5).float())
