"""Losses and per-example quantities from logits, in float32 whatever the model computes in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fedpeft.data.collate import IGNORED


@dataclass(frozen=True)
class ExampleScores:
    """Per example of a batch, float64 or bool on the CPU.

    Attributes:
        nll: [B] summed negative log-likelihood of the scored tokens (or of the class), nats.
        tokens: [B] number of scored tokens (1 for a class).
        correct: [B] scored tokens whose argmax is the target.
    """

    nll: Tensor
    tokens: Tensor
    correct: Tensor


def token_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits that predict scored tokens, their targets, and which example each belongs to.

    Soft prompts make the logits longer than the labels, at the front, so the last T positions are taken.

    Args:
        logits: [B, V + T, vocabulary].
        labels: [B, T], `IGNORED` where nothing is scored; position t is predicted at t - 1.

    Returns:
        ([N, vocabulary] float32, [N] int64, [N] int64) for the N scored tokens.
    """
    length = labels.shape[1]
    shifted = logits[:, -length:, :][:, :-1, :]
    targets = labels[:, 1:]
    scored = targets != IGNORED
    example = scored.nonzero()[:, 0]
    return (
        shifted[scored].float(),
        targets[scored],
        example,
    )  # only scored rows are cast: vocabularies are large


def causal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed negative log-likelihood of the scored tokens, float32[]."""
    rows, targets, _ = token_logits(logits, labels)
    return functional.cross_entropy(rows, targets, reduction="sum")


def class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed negative log-likelihood of the classes, float32[]."""
    return functional.cross_entropy(logits.float(), labels, reduction="sum")


LOSSES = {"causal-lm": causal_loss, "sequence-classification": class_loss}


def compute_causal_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each scored token, float32[N]."""
    rows, targets, _ = token_logits(logits, labels)
    return functional.cross_entropy(rows, targets, reduction="none")


def compute_class_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each class, float32[B]."""
    return functional.cross_entropy(logits.float(), labels, reduction="none")


SCORED_LOSSES = {"causal-lm": compute_causal_losses, "sequence-classification": compute_class_losses}


def precise_causal_loss(logits: Tensor, labels: Tensor) -> float:
    """`causal_loss` with the tokens' float32 losses summed in float64, for differences of nearby losses."""
    return float(compute_causal_losses(logits, labels).double().sum())


def precise_class_loss(logits: Tensor, labels: Tensor) -> float:
    """`class_loss` with the examples' float32 losses summed in float64."""
    return float(compute_class_losses(logits, labels).double().sum())


PRECISE_LOSSES = {"causal-lm": precise_causal_loss, "sequence-classification": precise_class_loss}


@torch.no_grad()
def causal_scores(logits: Tensor, labels: Tensor) -> ExampleScores:
    """Scores of a causal batch; see `ExampleScores`."""
    rows, targets, example = token_logits(logits, labels)
    nll = functional.cross_entropy(rows, targets, reduction="none").double()
    hits = (rows.argmax(dim=-1) == targets).double()
    size = labels.shape[0]

    def per_example(values: Tensor) -> Tensor:
        return torch.zeros(size, dtype=torch.float64).index_add_(0, example.cpu(), values.cpu())

    return ExampleScores(per_example(nll), per_example(torch.ones_like(nll)), per_example(hits))


@torch.no_grad()
def class_scores(logits: Tensor, labels: Tensor) -> ExampleScores:
    """Scores of a batch of classified examples; see `ExampleScores`."""
    nll = functional.cross_entropy(logits.float(), labels, reduction="none").double().cpu()
    hits = (logits.argmax(dim=-1) == labels).double().cpu()
    return ExampleScores(nll, torch.ones_like(nll), hits)


SCORES = {"causal-lm": causal_scores, "sequence-classification": class_scores}
