"""LQ-LoRA's first step: the low-rank part is taken out before anything is quantised.

LoftQ quantises W first and fits factors to what was lost. LQ-LoRA fits them to W itself, so that what is
quantised has no large singular values, and goes on as LoftQ does until the error rises.

Source: Guo, Greengard, Xing, Kim 2024, "LQ-LoRA" (arXiv 2311.12023), algorithm 1. Their code returns the pair
after the error rose; ours the best one. Their weights by Fisher information need data, which clients hold,
and their search for each layer's bits another budget: neither is here.
"""

from __future__ import annotations

import torch

__all__ = ["first_packed"]


def first_packed(weight: torch.Tensor, rank: int) -> torch.Tensor:
    """W less its best approximation of a rank, float32 (out, in): what is quantised first."""
    left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
    rest: torch.Tensor = weight - (left[:, :rank] * sizes[:rank]) @ right[:rank]
    return rest
