"""Ranks that a client gives up while it trains, because they shrink: HetLoRA's self-pruning.

A client of rank r trains with  + penalty * sum over modules of |B[:, k:r]| |A[k:r, :]|  in its loss, k being
`keep` times r, rounded down. Where that sum is smaller after a round's training than before it, the client's
rank is k from then on: what lies beyond is zero, in what it sends and in whatever it is sent later.

Source: Cho et al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
section 3.2 (rank self-pruning). There one product of norms is compared; ours is the sum over modules, which
all have one rank. A pruned client holds and sends zeros, so that its rank is free to differ from round to
round; who wants fewer bytes gives its group a lower `peft.r`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedpeft.adapters.lora_names import factor_role
from fedpeft.config.sections import PruningSection

_TINY = 1e-12  # a norm below counts as zero, which has no direction to shrink in

Pair = tuple[nn.Parameter, nn.Parameter]


@dataclass(frozen=True)
class SelfPruning:
    """One client's ranks over one round of training.

    Attributes:
        pairs: A (r, in) and B (out, r) of every module.
        rank: how many ranks the client has not given up.
    """

    pairs: tuple[Pair, ...]
    section: PruningSection
    rank: int

    @property
    def rank_after_shrinking(self) -> int:
        """What its rank becomes if the last ranks shrink."""
        return max(1, int(self.section.keep * self.rank))

    @torch.no_grad()
    def clear(self, rank: int | None = None) -> None:
        """Let what lies beyond the rank be zero; it stays so: two factors of zero have gradients of zero."""
        first = self.rank if rank is None else rank
        for a, b in self.pairs:
            a[first:].zero_()
            b[:, first:].zero_()

    @torch.no_grad()
    def size(self) -> float:
        """The sum of products of norms of the last ranks that there are."""
        return sum(float(b.norm().double() * a.norm().double()) for a, b in self._last())

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add the penalty's gradient to the gradients of all factors that train."""
        for (a, b), (last_a, last_b) in zip(self.pairs, self._last(), strict=True):
            size_a, size_b = last_a.norm(), last_b.norm()
            for parameter, last, own, other in ((a, last_a, size_a, size_b), (b, last_b, size_b, size_a)):
                if parameter.grad is not None and own > _TINY:
                    pull = last * (self.section.penalty * other / own)
                    self._of(parameter.grad, parameter is a).add_(pull)

    def after(self, before: float) -> int:
        """The rank after training that began with last ranks of a size; what is given up becomes zero."""
        if self.rank_after_shrinking == self.rank or not self.size() < before:
            return self.rank
        self.clear(self.rank_after_shrinking)
        return self.rank_after_shrinking

    def _last(self) -> Iterator[tuple[Tensor, Tensor]]:
        for a, b in self.pairs:
            yield self._of(a.detach(), True), self._of(b.detach(), False)

    def _of(self, factor: Tensor, rows: bool) -> Tensor:
        return (
            factor[self.rank_after_shrinking : self.rank]
            if rows
            else factor[:, self.rank_after_shrinking : self.rank]
        )


def self_pruning(
    parameters: Mapping[str, nn.Parameter], section: PruningSection, rank: int | None
) -> SelfPruning:
    """Find the factors of all modules.

    Args:
        rank: what the client has left; None: it has given up nothing yet.
    """
    pairs = []
    for name, parameter in parameters.items():
        role, pattern = factor_role(name)
        if role == "lora_A":
            pairs.append((parameter, parameters[pattern.format("lora_B")]))
    whole = min((a.shape[0] for a, _ in pairs), default=1)
    return SelfPruning(tuple(pairs), section, whole if rank is None else min(rank, whole))
