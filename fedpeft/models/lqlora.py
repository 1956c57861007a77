"""LQ-LoRA's first step: the low-rank part is taken out before anything is quantised.

LoftQ quantises W first and fits factors to what was lost. LQ-LoRA fits them to W itself, so that what is
quantised has no large singular values, and goes on as LoftQ does until the error rises.

Source: Guo, Greengard, Xing, Kim 2024, "LQ-LoRA" (arXiv 2311.12023), algorithm 1. Their code returns the pair
after the error rose; ours the best one. Their weights by Fisher information need data, which clients hold,
and their search for each layer's bits another budget: neither is here.
"""

from __future__ import annotations

import torch

__all__ = ["largest_directions"]


def largest_directions(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """W's best approximation of a rank as factors (out, r) and (r, in): what is taken out first."""
    left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
    return left[:, :rank] * sizes[:rank], right[:rank].contiguous()
