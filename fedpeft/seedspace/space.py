"""The exact seed space of one run: theta = theta_0 + quantum * sum_k A_k z_k, and its inverse direction."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from fedpeft.errors import ModelError, UpdateError
from fedpeft.seedspace.accumulate import accumulate
from fedpeft.seedspace.bounds import check_amounts
from fedpeft.seedspace.layout import MAX_DIRECTION, CounterStream, Span, tensor_ids
from fedpeft.seedspace.project import MAX_EXPONENT, MIN_EXPONENT, project
from fedpeft.seedspace.rounding import combine

# Sums of this many coordinates exist at a time, whatever the model's size: 2 MB of int64 on a CPU; a card
# needs thousands of programs at once to be busy.
_CPU_CHUNK, _CARD_CHUNK = 2**18, 2**24


def chunk_of(device: torch.device) -> int:
    """How many coordinates are summed and rounded at a time on a device; no result depends on it."""
    return _CPU_CHUNK if device.type == "cpu" else _CARD_CHUNK


@dataclass(frozen=True)
class SeedSpace:
    """What every participant agrees on before round 1.

    `shapes` maps the canonical name of each trainable tensor to its shape; ids follow from the names.
    `exponent` is log2 of the quantum. `num_seeds` is K: directions are the indices below it.

    Raises: ModelError for no tensors; UpdateError for K or a quantum out of range.
    """

    stream: CounterStream
    num_seeds: int
    exponent: int
    shapes: Mapping[str, tuple[int, ...]]
    ids: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        if not self.shapes:
            raise ModelError("a seed space over no tensors: make at least one parameter trainable")
        if not 0 < self.num_seeds <= MAX_DIRECTION + 1:
            raise UpdateError(f"{self.num_seeds} seeds: need 1 to {MAX_DIRECTION + 1}")
        if not MIN_EXPONENT <= self.exponent <= MAX_EXPONENT:
            raise UpdateError(
                f"quantum 2^{self.exponent} is out of range: need 2^{MIN_EXPONENT} to 2^{MAX_EXPONENT}"
            )
        object.__setattr__(self, "ids", tensor_ids(self.shapes))

    @property
    def quantum(self) -> float:
        """The weight that one unit of an amount moves."""
        return 2.0**self.exponent

    @property
    def dimension(self) -> int:
        """Coordinates in all tensors."""
        return sum(self.size(name) for name in self.shapes)

    def size(self, name: str) -> int:
        """Coordinates in one tensor."""
        return torch.Size(self.shapes[name]).numel()

    def span(self, name: str) -> Span:
        """All coordinates of one tensor."""
        return Span(self.ids[name], 0, self.size(name))

    def check_amounts(self, amounts: torch.Tensor) -> int:
        """Sum |A_k| of int64 [K] amounts.

        Raises: UpdateError for another length or type, or when the sum reaches 2^53.
        """
        if tuple(amounts.shape) != (self.num_seeds,):
            raise UpdateError(f"amounts have shape {tuple(amounts.shape)}: this run has K = {self.num_seeds}")
        return check_amounts(torch.arange(self.num_seeds), amounts)

    def replay(
        self,
        base: Mapping[str, torch.Tensor],
        amounts: torch.Tensor,
        into: Mapping[str, torch.Tensor],
        *,
        backend: str | None = None,
        threads: int = 1,
    ) -> None:
        """Writes theta_0 + quantum * sum_k amounts[k] z_k into the tensors `into`, `base` itself if wished.

        `base` holds theta_0 by canonical name, `amounts` is int64 [K]. Each weight is rounded once, whatever
        history led to the amounts. Sums exist for one chunk at a time.

        Raises: ModelError when a tensor is missing or has another shape; UpdateError for unusable amounts.
        """
        self.check_amounts(amounts)
        used = amounts.nonzero().flatten()
        for name in sorted(self.shapes):
            source, target = self._flat(base, name), self._flat(into, name)
            chunk = chunk_of(source.device)
            for start in range(0, self.size(name), chunk):
                stop = min(start + chunk, self.size(name))
                sums = accumulate(
                    self.stream,
                    Span(self.ids[name], start, stop),
                    used,
                    amounts[used],
                    device=source.device,
                    backend=backend,
                    threads=threads,
                )
                target[start:stop] = combine(source[start:stop], sums, self.exponent)

    def project(
        self,
        delta: Mapping[str, torch.Tensor],
        directions: torch.Tensor,
        *,
        backend: str | None = None,
        threads: int = 1,
    ) -> torch.Tensor:
        """int64 [len(directions)]: dot products over all tensors of int64 `delta` with each direction.

        Raises: ModelError for a missing tensor; UpdateError when a dot product could overflow.
        """
        largest = max((int(part.abs().max()) for part in delta.values() if part.numel()), default=0)
        if largest * self.dimension >= 2**61:
            raise UpdateError(
                f"delta reaches {largest} over {self.dimension} coordinates: use a coarser quantum"
            )
        result = torch.zeros(len(directions), dtype=torch.int64)
        for name in sorted(self.shapes):
            part = self._flat(delta, name)
            result += project(
                self.stream, self.span(name), directions, part, backend=backend, threads=threads
            )
        return result

    def _flat(self, tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        if name not in tensors:
            raise ModelError(f"tensor {name!r} of the seed space is missing: the models differ")
        tensor = tensors[name].detach()
        if tuple(tensor.shape) != tuple(self.shapes[name]):
            raise ModelError(
                f"tensor {name!r} has shape {tuple(tensor.shape)}: the run has {self.shapes[name]}"
            )
        if not tensor.is_contiguous():
            raise ModelError(f"tensor {name!r} is strided: make it contiguous before it enters seed space")
        return tensor.view(-1)
