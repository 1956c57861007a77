"""Back-propagation on a client's rows: the first-order local trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedpeft.config import TrainingSection
from fedpeft.data.collate import Task, collate, training_batches
from fedpeft.data.encoded import Encoded
from fedpeft.errors import TrainingError
from fedpeft.training.losses import LOSSES
from fedpeft.training.optimizers import build_optimizer, build_schedule


@dataclass(frozen=True)
class Rows:
    """The rows that one training run may use."""

    encoded: Encoded
    indices: NDArray[np.int64]
    task: Task
    pad_id: int


@dataclass(frozen=True)
class TrainingReport:
    """What local training did: mean loss over its steps (nats per scored token or class), steps, rows."""

    loss: float
    steps: int
    examples: int


def train(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    rows: Rows,
    section: TrainingSection,
    *,
    steps: int,
    rng: np.random.Generator,
    proximal_mu: float = 0.0,
    on_step: Callable[[int], None] | None = None,
) -> TrainingReport:
    """Train `parameters` in place for `steps` optimiser steps.

    The loss is the mean over the scored tokens (or classes) of all rows of a step, whatever the split in
    micro-batches, plus ``proximal_mu / 2 * |w - w_start|^2`` (Li et al. 2020, FedProx, eq. 2). The optimiser
    starts fresh. Row order and dropout come from `rng`; torch's global generator is left as it was.

    Raises:
        TrainingError: the loss became NaN or infinite.
    """
    trained = list(parameters.values())
    start = [p.detach().clone() for p in trained] if proximal_mu else []
    optimizer = build_optimizer(section, trained)
    schedule = build_schedule(section, optimizer, steps)
    batches = training_batches(
        rows.encoded, rows.indices, section.batch_size, steps * section.gradient_accumulation, rng
    )
    total, seen = 0.0, 0
    with training_mode(model, section, int(rng.integers(2**62))):
        for step in range(steps):
            micro = [next(batches) for _ in range(section.gradient_accumulation)]
            optimizer.zero_grad(set_to_none=True)
            loss = _accumulate(model, micro, rows, section)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the training loss is {loss} at local step {step + 1} of {steps}; lower training.lr"
                    f" (now {section.lr:g}),"
                    " set training.max_grad_norm, or look for broken rows"
                )
            add_proximal_gradient(trained, start, proximal_mu)
            if section.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(trained, section.max_grad_norm)
            optimizer.step()
            schedule.step()
            total += loss
            seen += sum(len(indices) for indices in micro)
            if on_step is not None:
                on_step(step + 1)
    optimizer.zero_grad(set_to_none=True)
    return TrainingReport(total / steps, steps, seen)


def _accumulate(
    model: nn.Module, micro: Sequence[NDArray[np.int64]], rows: Rows, section: TrainingSection
) -> float:
    """Gradients of the mean loss over all micro-batches together; returns that loss."""
    device = next(model.parameters()).device
    batches = [collate(rows.encoded, indices, rows.pad_id, task=rows.task) for indices in micro]
    scored = max(1, sum(batch.tokens for batch in batches))
    total = 0.0
    for batch in batches:
        with _autocast(section, device):
            logits = model(
                input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device)
            ).logits
        summed = LOSSES[rows.task](logits, batch.labels.to(device))
        (summed / scored).backward()  # type: ignore[no-untyped-call]  # torch annotates it so
        total += float(summed.detach())
    return total / scored


def add_proximal_gradient(trained: Sequence[nn.Parameter], start: Sequence[Tensor], mu: float) -> None:
    """Add ``mu * (w - w_start)`` to the gradients; nothing when `start` is empty."""
    for parameter, origin in zip(trained, start, strict=False):
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - origin, alpha=mu)


def _autocast(section: TrainingSection, device: torch.device) -> AbstractContextManager[object]:
    if section.precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


@contextmanager
def training_mode(model: nn.Module, section: TrainingSection, seed: int) -> Iterator[None]:
    """Dropout on, checkpointing as asked, torch's global generator seeded for dropout and restored after."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        model.train()
        if section.gradient_checkpointing:
            _enable_checkpointing(model)
        try:
            yield
        finally:
            if section.gradient_checkpointing:
                model.activation_checkpointing_disable()  # type: ignore[operator]
                model.disable_input_require_grads()  # type: ignore[operator]
            model.eval()


def _enable_checkpointing(model: nn.Module) -> None:
    """Recompute activations in the backward pass; inputs carry gradients, as first blocks are frozen."""
    model.enable_input_require_grads()  # type: ignore[operator]
    model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
