"""A participant's global state: base weights, amounts, and the integer sums that make catching up cheap."""

from collections.abc import Mapping

import torch

from fedpeft.errors import UpdateError
from fedpeft.seedspace.accumulate import accumulate
from fedpeft.seedspace.digest import digest
from fedpeft.seedspace.layout import MAX_INT32, Span
from fedpeft.seedspace.rounding import combine
from fedpeft.seedspace.space import SeedSpace, chunk_of


class SeedState:
    """theta_0, A and S = sum_k A_k z_k, kept in step.

    Integer sums forget their history: S after any sequence of `advance` equals S from A alone, so a
    veteran, a late joiner and one who missed rounds hold the same bits. Cost: four bytes per trainable
    weight beside theta_0, and each `advance` costs the changed directions only. Where that memory is too
    much, use `SeedSpace.replay` from theta_0 instead.
    """

    def __init__(self, space: SeedSpace, base: Mapping[str, torch.Tensor]) -> None:
        self.space = space
        self.base = {name: base[name].detach() for name in sorted(space.shapes)}
        self.amounts = torch.zeros(space.num_seeds, dtype=torch.int64)
        self._sums = {
            name: torch.zeros(space.size(name), dtype=torch.int32, device=tensor.device)
            for name, tensor in self.base.items()
        }

    def advance(self, difference: torch.Tensor, *, backend: str | None = None, threads: int = 1) -> None:
        """Adds int64 [K] `difference` to A, and its directions to S.

        Raises: UpdateError when the new sum |A_k| leaves 31 bits; the state is then unchanged.
        """
        self.space.check_amounts(difference)
        amounts = self.amounts + difference
        if self.space.check_amounts(amounts) > MAX_INT32:
            raise UpdateError("amounts add up to more than 2^31 - 1: use a coarser quantum or a new base")
        changed = difference.nonzero().flatten()
        for name, sums in self._sums.items():
            chunk = chunk_of(sums.device)
            for start in range(0, len(sums), chunk):
                part = sums[start : start + chunk]
                span = Span(self.space.ids[name], start, start + len(part))
                part += accumulate(
                    self.space.stream,
                    span,
                    changed,
                    difference[changed],
                    device=part.device,
                    backend=backend,
                    threads=threads,
                )
        self.amounts = amounts

    def write(self, into: Mapping[str, torch.Tensor]) -> None:
        """Writes theta = theta_0 + quantum * S into the tensors of these names."""
        for name, base in self.base.items():
            target, flat, sums = into[name].detach().view(-1), base.view(-1), self._sums[name]
            chunk = chunk_of(sums.device)
            for start in range(0, len(sums), chunk):
                window = slice(start, start + chunk)
                target[window] = combine(flat[window], sums[window], self.space.exponent)

    def fingerprint(self) -> str:
        """SHA-256 over the weights of this state."""
        weights = {name: torch.empty_like(tensor) for name, tensor in self.base.items()}
        self.write(weights)
        return digest(weights)
