"""Adam whose moments live in a small subspace of each matrix's gradient.

For a weight (m, n) with gradient G and m >= n: P (n, r) holds the right singular vectors of the r largest
singular values of the first gradient of a period, Adam runs on R = G P (m, r), and the weight moves by
scale * lr * (its step) P^T; for m < n the same from the left. Vectors, and matrices whose smaller side is at
most r, are moved by Adam itself.

Source: Zhao et al. 2024, "GaLore" (arXiv 2403.03507), algorithm 2. Moments stay when the subspace changes, as
there. Weight decay is decoupled. The one package with the authors' code has had a single release and needs
bitsandbytes for plain Adam too; this one needs torch alone and works with any number of dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ProjectedAdam", "count_kept_numbers"]

_BETAS, _EPSILON = (0.9, 0.999), 1e-8


def count_kept_numbers(shape: tuple[int, ...], rank: int) -> int:
    """Numbers kept between steps for one parameter: two moments, and the subspace of a projected one."""
    if not _projects(shape, rank):
        return 2 * math.prod(shape)
    tall, wide = max(shape), min(shape)
    return 2 * tall * rank + wide * rank


def _projects(shape: Iterable[int], rank: int) -> bool:
    sizes = tuple(shape)
    return len(sizes) == 2 and min(sizes) > rank


class ProjectedAdam(torch.optim.Optimizer):
    """See the module.

    Args:
        parameters: to move.
        lr: learning rate.
        weight_decay: decoupled, of the whole weight.
        rank: r of every projected matrix.
        every: steps between two subspaces.
        scale: of a projected step.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        rank: int,
        every: int,
        scale: float,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        self._rank, self._every, self._scale = rank, every, scale

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no loss
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group["lr"], group["weight_decay"])

    def _move(self, parameter: nn.Parameter, lr: float, decay: float) -> None:
        gradient: Any = parameter.grad
        state = self.state[parameter]
        count = int(state.get("count", 0))
        projected = _projects(parameter.shape, self._rank)
        if projected and count % self._every == 0:
            state["subspace"] = _subspace(gradient, self._rank)
        inside = _into(gradient, state["subspace"]) if projected else gradient
        state["count"] = count + 1
        step = _adam_step(inside, state)
        parameter.mul_(1 - lr * decay)
        if projected:
            parameter.add_(_out_of(step, state["subspace"], parameter.shape), alpha=-lr * self._scale)
        else:
            parameter.add_(step, alpha=-lr)


def _adam_step(gradient: Tensor, state: dict[str, Any]) -> Tensor:
    """Adam's direction (Kingma, Ba 2015, algorithm 1), its moments updated in place."""
    if "first" not in state:
        state["first"], state["second"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    first, second, count = state["first"], state["second"], state["count"]
    first.lerp_(gradient, 1 - _BETAS[0])
    second.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
    root = (second / (1 - _BETAS[1] ** count)).sqrt_().add_(_EPSILON)
    direction: Tensor = first / (1 - _BETAS[0] ** count) / root
    return direction


def _subspace(gradient: Tensor, rank: int) -> Tensor:
    """Orthonormal columns (smaller side, r) of the gradient's largest singular values.

    From the eigenvectors of the smaller Gram matrix in float64: no factor as large as the gradient is made.
    Each column's largest entry is positive: moments outlive a subspace, so that a sign that a library is free
    to choose would otherwise decide which way they point in the next.
    """
    tall = gradient if gradient.shape[0] >= gradient.shape[1] else gradient.t()
    gram = (tall.t() @ tall).double()
    vectors: Tensor = torch.linalg.eigh(gram)[1]  # ascending
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return (vectors * largest.sign())[:, -rank:].flip(1).to(gradient.dtype).contiguous()


def _into(gradient: Tensor, subspace: Tensor) -> Tensor:
    """Coordinates of the gradient: (m, r) of a tall matrix, (r, n) of a wide one."""
    if gradient.shape[0] >= gradient.shape[1]:
        return gradient @ subspace
    return subspace.t() @ gradient


def _out_of(step: Tensor, subspace: Tensor, shape: torch.Size) -> Tensor:
    return step @ subspace.t() if shape[0] >= shape[1] else subspace @ step
