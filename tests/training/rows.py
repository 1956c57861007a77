"""Rows of made-up tokens for tiny models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedpeft.config.sections import PeftSection
from fedpeft.data.encoded import Encoded, offsets_of
from fedpeft.models.attach import attach
from fedpeft.training.first_order import Rows
from tests.models.tiny import LABELS, TASKS, VOCABULARY, tiny_base

LENGTHS = (7, 12, 5, 9, 10)


def rows_for(kind: str, lengths: Sequence[int] = LENGTHS, seed: int = 0) -> Rows:
    rng = np.random.default_rng(seed)
    encoded = Encoded(
        rng.integers(1, VOCABULARY, sum(lengths)).astype(np.int32),
        offsets_of(lengths),
        rng.integers(0, 5, len(lengths)).astype(np.int32),
        rng.integers(0, LABELS, len(lengths)),
    )
    task = "causal-lm" if TASKS[kind] == "causal-lm" else "sequence-classification"
    return Rows(encoded, np.arange(len(lengths)), task, 0)  # type: ignore[arg-type]  # one of the two tasks


def attached(method: str, kind: str) -> nn.Module:
    """A model whose trained tensors are all away from zero, where LoRA's would hide mistakes."""
    base = tiny_base(kind)
    model = attach(base, PeftSection(method=method), task=TASKS[kind], seed=5)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def still(model: nn.Module) -> nn.Module:
    """In training mode, but without dropout."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def loss_of(model: nn.Module, rows: Rows, index: int) -> Tensor:
    """One row's loss from first principles: unpadded, the mean over its scored tokens."""
    ids = torch.from_numpy(rows.encoded.row(index).astype(np.int64))[None]
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    if rows.task == "sequence-classification":
        assert rows.encoded.labels is not None
        return functional.cross_entropy(logits, torch.tensor([int(rows.encoded.labels[index])]))
    first = max(int(rows.encoded.answer_start[index]), 1)
    logits = logits[0, -ids.shape[1] :]
    return functional.cross_entropy(logits[first - 1 : -1], ids[0, first:])


def single_gradients(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], rows: Rows, index: int
) -> dict[str, Tensor]:
    """The gradient of one row's loss, by autograd."""
    grads = torch.autograd.grad(loss_of(model, rows, index), list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if grad is None else grad
        for (name, p), grad in zip(parameters.items(), grads, strict=True)
    }


def norm(gradients: Mapping[str, Tensor]) -> float:
    return math.hypot(*(float(g.double().norm()) for g in gradients.values()))
