"""The supports that trainers use: some tensors, one block for each direction, small weights only."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from fedpeft.seedspace.digest import digest
from fedpeft.seedspace.layout import CounterStream, Purpose, tensor_ids
from fedpeft.seedspace.philox import philox_torch
from fedpeft.seedspace.trainable_tensors import trainable_parameters

_NUMBERED = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, eq=False)
class SomeTensors:
    """The same tensors for every direction, each as a whole."""

    ids: frozenset[int]
    digest: str = ""

    def moves(self, tensor_id: int, directions: torch.Tensor) -> torch.Tensor:
        """All of the directions or none."""
        return torch.full(directions.shape, tensor_id in self.ids, dtype=torch.bool)

    def mask(self, tensor_id: int) -> None:
        """Everything."""


def _choice(seed: int, directions: torch.Tensor) -> torch.Tensor:
    """int64 [K]: 32 public bits for each of int64 [K] directions."""
    stream = CounterStream(seed, Purpose.CHOICE)
    return philox_torch((0, *stream.counter_words(0)), (directions, stream.key_word))[0]


@lru_cache(maxsize=1024)
def _block_of(seed: int, direction: int, count: int) -> int:
    return int(_choice(seed, torch.tensor([direction]))) % count


@dataclass(frozen=True, eq=False)
class OneBlock:
    """Each direction moves the tensors of one block, which the public stream chooses by its index.

    Source: Zhang et al. 2024, block-wise ZO; there blocks take turns and share one seed, so that their
    directions are alike. A choice by index needs no order of visits, so it can be replayed.

    Attributes:
        blocks: block by tensor id, 0 to `count` - 1.
    """

    seed: int
    blocks: Mapping[int, int]
    count: int
    digest: str = ""

    def choose_blocks(self, directions: torch.Tensor) -> torch.Tensor:
        """int64 [K]: the block of each direction; 32 bits modulo `count`, so all but equally likely."""
        if len(directions) == 1:  # every tensor of a perturbed forward asks this
            return torch.tensor([_block_of(self.seed, int(directions), self.count)])
        return _choice(self.seed, directions) % self.count

    def moves(self, tensor_id: int, directions: torch.Tensor) -> torch.Tensor:
        """Those that chose the tensor's block."""
        return self.choose_blocks(directions) == self.blocks[tensor_id]

    def mask(self, tensor_id: int) -> None:
        """Everything."""


@dataclass(frozen=True, eq=False)
class Masked:
    """The same coordinates for every direction."""

    masks: Mapping[int, torch.Tensor]
    digest: str

    def moves(self, tensor_id: int, directions: torch.Tensor) -> torch.Tensor:
        """All of them."""
        return torch.ones(directions.shape, dtype=torch.bool)

    def mask(self, tensor_id: int) -> torch.Tensor:
        """The tensor's own."""
        return self.masks[tensor_id]


def smallest_weights(
    model: nn.Module, density: float, magnitudes: Mapping[str, torch.Tensor] | None = None
) -> Masked:
    """The `density` share of each trainable tensor with the least magnitudes, at least one weight of it.

    To be called on theta_0: a mask that followed the weights would make replay depend on the order of steps.
    Of equal magnitudes the earlier ones count as smaller, so the mask is one and the same everywhere.

    Args:
        magnitudes: what counts in place of a tensor's own magnitudes, by its name; for tensors that begin all
            alike, whose own ones choose nothing.

    Source: Liu et al. 2024, Sparse MeZO, with its threshold per layer as an exact share of each tensor.
    """
    parameters = trainable_parameters(model)
    masks = {}
    for name, parameter in parameters.items():
        flat = parameter.detach().reshape(-1)
        kept = max(1, math.floor(density * flat.numel()))
        own = (magnitudes or {}).get(name)
        sizes = flat.abs() if own is None else own.reshape(-1).to(flat.device)
        order = torch.argsort(sizes, stable=True)
        masks[name] = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
        masks[name][order[:kept]] = True
    ids = tensor_ids(parameters)
    return Masked({ids[name]: mask for name, mask in masks.items()}, digest(masks))


def block_of_names(model: nn.Module) -> dict[str, int]:
    """Trainable tensors by canonical name, each with its block from 0: embeddings, layers, what follows.

    A layer is known by the first number in a name. What has none belongs to block 0 where the model registers
    it before its first layer, else to the block after the last. A tied weight belongs to its lowest place.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    numbers = [int(found[1]) if (found := _NUMBERED.search(name)) else None for name in names]
    layers = [number for number in numbers if number is not None]
    behind = max(layers, default=-1) + 2
    blocks: dict[int, int] = {}
    reached = False
    for (_, parameter), number in zip(model.named_parameters(remove_duplicate=False), numbers, strict=True):
        reached = reached or number is not None
        place = number + 1 if number is not None else (behind if reached else 0)
        blocks[id(parameter)] = min(place, blocks.get(id(parameter), place))
    return {name: blocks[id(parameter)] for name, parameter in trainable_parameters(model).items()}


def one_block(model: nn.Module, seed: int) -> OneBlock:
    """Blocks by layer, of those that have trainable tensors."""
    by_name = block_of_names(model)
    rank = {block: place for place, block in enumerate(sorted(set(by_name.values())))}
    ids = tensor_ids(by_name)
    return OneBlock(seed, {ids[name]: rank[block] for name, block in by_name.items()}, len(rank))


def lowest_blocks(model: nn.Module, layers: int) -> SomeTensors:
    """What comes before the first layer, and the first `layers` layers."""
    by_name = block_of_names(model)
    ids = tensor_ids(by_name)
    return SomeTensors(frozenset(ids[name] for name, block in by_name.items() if block <= layers))
