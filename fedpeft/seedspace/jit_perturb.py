"""Forward passes at theta + scale * z without a second copy of theta and without touching it.

Each module that owns trainable parameters gets a forward that perturbs its own weights on the way, uses
them and drops them: a linear layer in blocks of output rows, an embedding only in the rows that were looked
up, anything else through a copy of its own parameters. Weights are never written, so there is nothing to
restore and nothing to drift: the in-place +, -2, + sequence of the published loops changes half of all
weights by rounding.

Source: the estimator is simultaneous perturbation (Spall, 1992) as in MeZO (Malladi et al., 2023, algorithm
1); we differ in perturbing per layer during the forward pass, and in the direction (signs, from a counter).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from fedpeft.errors import TrainingError
from fedpeft.seedspace.backends import Shift
from fedpeft.seedspace.bounds import check_scale
from fedpeft.seedspace.layout import CounterStream
from fedpeft.seedspace.perturb import perturb_rows, prepare
from fedpeft.seedspace.trainable_tensors import ids_by_identity

# Each block costs a call of the matrix product; it and the weights that it is made of should fit the cache of
# the second level together. Small beside a language model's logits.
BLOCK_BYTES = 2**20
_ALIGNED = 64  # rows: products whose columns begin elsewhere take up to a seventh longer

Forward = Callable[..., torch.Tensor]


class Scratch:
    """One buffer per dtype and device, used by one product after another: fresh pages would cost more time.

    Hence a perturbed model runs in one thread at a time.
    """

    def __init__(self) -> None:
        self._wanted: dict[tuple[torch.dtype, torch.device], int] = {}
        self._buffers: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}

    def announce(self, weights: torch.Tensor, numel: int) -> None:
        """So many elements will be wanted: said of all before the first use, the buffer never moves."""
        kind = (weights.dtype, weights.device)
        self._wanted[kind] = max(numel, self._wanted.get(kind, 0))

    def like(self, weights: torch.Tensor) -> torch.Tensor:
        """Memory of the shape, dtype and device of `weights`, shared with all that came from here."""
        kind = (weights.dtype, weights.device)
        buffer = self._buffers.get(kind)
        if buffer is None or len(buffer) < weights.numel():
            self.announce(weights, weights.numel())
            buffer = self._buffers[kind] = torch.empty(self._wanted[kind], dtype=kind[0], device=kind[1])
        return buffer[: weights.numel()].view(weights.shape)


class Point:
    """Where the model is evaluated: theta + scale * z, z being `direction`; `JustInTime` moves it."""

    def __init__(self, stream: CounterStream, backend: str | None, block_bytes: int) -> None:
        self.stream = stream
        self.backend = backend
        self.block_bytes = block_bytes
        self.direction = 0
        self.scale = 0.0
        self.scratch = Scratch()

    def rows(self, weights: torch.Tensor) -> int:
        """How many rows of a matrix make a block; whole cache lines of the result, where that is possible."""
        rows = self.block_bytes // (weights.shape[1] * weights.element_size())
        return max(1, rows - rows % _ALIGNED if rows > _ALIGNED else rows)


class Whole:
    """Perturbed copies of one tensor."""

    def __init__(self, point: Point, tensor_id: int, weights: torch.Tensor) -> None:
        self._point, self._tensor_id, self._weights = point, tensor_id, weights
        self._place = -1

    def __call__(self) -> torch.Tensor:
        """A fresh copy at the point."""
        weights, point = self._weights.detach(), self._point
        if weights.data_ptr() != self._place:  # the first time, or the parameter has moved
            self._shift = prepare(point.stream, self._tensor_id, weights, backend=point.backend)
            self._place = weights.data_ptr()
        copy = torch.empty_like(weights, memory_format=torch.contiguous_format)
        self._shift(point.direction, point.scale, copy)
        return copy


@dataclass(frozen=True)
class Block:
    """Rows [first, last) of a matrix; `values` is scratch memory that `shift` fills, until the next block."""

    first: int
    last: int
    shift: Shift
    values: torch.Tensor


class Matrix:
    """Blocks of rows of one perturbed matrix, one after another in scratch memory."""

    def __init__(self, point: Point, tensor_id: int, weights: torch.Tensor) -> None:
        self._point, self._tensor_id, self._weights = point, tensor_id, weights
        self._place = -1
        self._blocks: list[Block] = []
        point.scratch.announce(weights, min(point.rows(weights), len(weights)) * weights.shape[1])

    def __len__(self) -> int:
        """How many blocks."""
        return -(-len(self._weights) // self._point.rows(self._weights))

    def __iter__(self) -> Iterator[Block]:
        """Each block, perturbed: use it before the next."""
        if self._weights.data_ptr() != self._place:  # the first time, or the parameter has moved
            self._blocks, self._place = list(self._prepare()), self._weights.data_ptr()
        for block in self._blocks:
            block.shift(self._point.direction, self._point.scale, block.values)
            yield block

    def _prepare(self) -> Iterator[Block]:
        point, weights = self._point, self._weights.detach()
        height, rows = len(weights), point.rows(weights)
        for first in range(0, height, rows):
            part = weights[first : first + rows]
            shift = prepare(
                point.stream, self._tensor_id, part, start=first * weights.shape[1], backend=point.backend
            )
            yield Block(first, first + len(part), shift, point.scratch.like(part))


@dataclass(frozen=True)
class Site:
    """A module whose forward is replaced, and the tensor ids of its trainable parameters by relative name."""

    module: nn.Module
    ids: Mapping[str, int]


def linear(site: Site, point: Point) -> Forward:
    """The product by blocks of rows of the weight: a block of memory, not a layer."""
    weight = site.module.get_parameter("weight")
    plain_bias: torch.Tensor | None = dict(site.module.named_parameters(recurse=False)).get("bias")
    matrix = Matrix(point, site.ids["weight"], weight) if "weight" in site.ids else None
    whole = Whole(point, site.ids["weight"], weight) if "weight" in site.ids else None
    moved = (
        Whole(point, site.ids["bias"], plain_bias) if plain_bias is not None and "bias" in site.ids else None
    )

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        bias = plain_bias if moved is None else moved()
        if matrix is None or whole is None:
            return nn.functional.linear(inputs, weight, bias)
        if torch.is_autocast_enabled(inputs.device.type):
            return nn.functional.linear(inputs, whole(), bias)
        if len(matrix) > 1:
            return _by_blocks(inputs, weight, bias, matrix)
        (only,) = matrix
        return nn.functional.linear(inputs, only.values, bias)

    return forward


def _by_blocks(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, matrix: Matrix
) -> torch.Tensor:
    """[..., height] products of [..., width] inputs, each block's written straight to its columns."""
    height, width = weight.shape
    flat = inputs.reshape(-1, width)  # [tokens, width]
    result = flat.new_empty(flat.shape[0], height)
    for block in matrix:
        columns, values = result[:, block.first : block.last], block.values.t()
        if bias is None:
            torch.mm(flat, values, out=columns)
        else:
            torch.addmm(bias[block.first : block.last], flat, values, out=columns)
    return result.view(*inputs.shape[:-1], height)


def embedding(site: Site, point: Point) -> Forward:
    """The looked-up rows of the perturbed table."""
    table = site.module.get_parameter("weight")

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        rows, scale = tokens.reshape(-1), point.scale
        picked = perturb_rows(
            point.stream, site.ids["weight"], point.direction, table, rows, scale, backend=point.backend
        )
        return picked.view(*tokens.shape, -1)

    return forward


def swap_parameters(site: Site, point: Point) -> Forward:
    """Any module: its own forward while perturbed copies stand in for its parameters."""
    original: Forward = site.module.forward
    places: list[tuple[dict[str, Any], str, torch.Tensor, Whole]] = []
    for path, tensor_id in site.ids.items():
        owner, name = _owner(site.module, path)
        weights = owner.get_parameter(name)
        places.append(
            (cast(dict[str, Any], owner._parameters), name, weights, Whole(point, tensor_id, weights))
        )

    def forward(*inputs: object, **named: object) -> torch.Tensor:
        try:
            for parameters, name, _, whole in places:
                parameters[name] = whole()
            return original(*inputs, **named)
        finally:
            for parameters, name, weights, _ in places:
                parameters[name] = weights

    return forward


def _owner(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds the parameter at a relative path, and the parameter's name in it."""
    outer, _, name = path.rpartition(".")
    return module.get_submodule(outer), name


# Exact types: a subclass may read its weights in ways of its own.
_FORWARDS: dict[type[nn.Module], Callable[[Site, Point], Forward]] = {
    nn.Linear: linear,
    nn.Embedding: embedding,
}
# Modules whose forward reads the parameters of their children without calling them.
_READS_CHILDREN = (nn.MultiheadAttention,)
# Containers that have no forward: the next module outwards reads their parameters.
_CONTAINERS = (nn.ParameterDict, nn.ParameterList)


class JustInTime:
    """Evaluates a model at theta + scale * z, for one trainable set.

    `ids` are the tensor ids by canonical name (`SeedSpace.ids`). Tied weights share their id, so they share
    z. Between two `with` blocks the model is untouched.

    Raises: ModelError when the model's trainable set isn't the one that `ids` names.
    """

    def __init__(
        self,
        model: nn.Module,
        ids: Mapping[str, int],
        stream: CounterStream,
        *,
        backend: str | None = None,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self._point = Point(stream, backend, block_bytes)
        sites = _sites(model, ids_by_identity(model, ids))
        self._forwards = [(site.module, _choose(site)(site, self._point)) for site in sites]

    @contextmanager
    def at(self, direction: int, scale: float) -> Iterator[None]:
        """Within the block, the model's forward is that of theta + scale * z of this direction.

        Raises: TrainingError where gradients are enabled: perturbed weights aren't leaves of any graph;
        UpdateError for a scale that isn't finite.
        """
        if torch.is_grad_enabled():
            raise TrainingError("a perturbed forward keeps no graph: run it under torch.no_grad()")
        check_scale(scale)
        self._point.direction, self._point.scale = direction, scale
        # An attribute of the instance goes before the class's method; `__dict__` spares Module's bookkeeping.
        previous = [module.__dict__.get("forward") for module, _ in self._forwards]
        try:
            for module, forward in self._forwards:
                module.__dict__["forward"] = forward
            yield
        finally:
            for (module, _), before in zip(self._forwards, previous, strict=True):
                if before is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.__dict__["forward"] = before


def _choose(site: Site) -> Callable[[Site, Point], Forward]:
    """The special forward where the module is plain enough for it, else a swapped copy."""
    module = site.module
    if "forward" in module.__dict__ or getattr(module, "max_norm", None) is not None:
        return swap_parameters
    return _FORWARDS.get(type(module), swap_parameters)


def _sites(model: nn.Module, ids: Mapping[int, int]) -> list[Site]:
    """One site for each module that reads trainable parameters, outermost reader first."""
    modules = dict(model.named_modules())
    found: dict[str, dict[str, int]] = {}
    for path, module in modules.items():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in ids:
                reader = _reader(path, modules)
                relative = f"{path}.{name}".removeprefix(f"{reader}." if reader else "").removeprefix(".")
                found.setdefault(reader, {})[relative] = ids[id(parameter)]
    return [Site(modules[path], names) for path, names in found.items()]


def _reader(path: str, modules: Mapping[str, nn.Module]) -> str:
    """The path of the module whose forward reads the parameters that the module at `path` owns."""
    parts = path.split(".") if path else []
    for depth in range(len(parts)):
        outer = ".".join(parts[:depth])
        if isinstance(modules[outer], _READS_CHILDREN):
            return outer
    while isinstance(modules[".".join(parts)], _CONTAINERS):
        parts = parts[:-1]
    return ".".join(parts)
