"""One loss per example, so that what one record adds to a gradient does not depend on its batch.

A mean over all tokens of a batch divides each record's loss by the others' lengths; clipping each gradient
then bounds nothing. Here each record's loss is the mean over its own scored tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fedpeft.training.losses import token_logits


def causal_example_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood of each row's scored tokens, float32[B]; 0 for a row without any."""
    rows, targets, example = token_logits(logits, labels)
    nll = functional.cross_entropy(rows, targets, reduction="none")
    counts = torch.bincount(example, minlength=labels.shape[0]).clamp(min=1)
    return torch.zeros(labels.shape[0], device=nll.device).index_add(0, example, nll) / counts


def class_example_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each row's class, float32[B]."""
    return functional.cross_entropy(logits.float(), labels, reduction="none")


EXAMPLE_LOSSES = {"causal-lm": causal_example_losses, "sequence-classification": class_example_losses}
