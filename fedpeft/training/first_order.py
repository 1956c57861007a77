"""Back-propagation on a client's rows: the first-order local trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedpeft.config.sections import TrainingSection
from fedpeft.data.collate import Task, collate, training_batches
from fedpeft.data.encoded import Encoded
from fedpeft.errors import TrainingError
from fedpeft.runtime.cancellation import check_cancelled
from fedpeft.training.layers import Periods
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
    """What local training did: mean loss over its steps (nats per scored token or class), steps, rows.

    `rank` is what self-pruning has left of a LoRA adapter's; 0 without it.
    """

    loss: float
    steps: int
    examples: int
    rank: int = 0


def train(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    rows: Rows,
    section: TrainingSection,
    *,
    steps: int,
    rng: np.random.Generator,
    layers_rng: np.random.Generator | None = None,
    proximal_mu: float = 0.0,
    add_gradient: Callable[[], None] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> TrainingReport:
    """Train `parameters` in place for `steps` optimiser steps.

    The loss is the mean over the scored tokens (or classes) of all rows of a step, whatever the split in
    micro-batches, plus ``proximal_mu / 2 * |w - w_start|^2`` (Li et al. 2020, FedProx, eq. 2). The optimiser
    starts fresh. Row order and dropout come from `rng`, sampled layers from `layers_rng`; torch's global
    generator is left as it was.

    Args:
        add_gradient: adds that of a further term of the loss, before gradients are clipped; a fused update
            has none.

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
    periods = Periods(parameters, section, layers_rng or rng)
    mover = _FusedMover if section.fused_update else _Mover
    total, seen = 0.0, 0
    with (
        training_mode(model, section, int(rng.integers(2**62))),
        periods.over(),
        mover(optimizer, trained, start, proximal_mu, section.max_grad_norm, add_gradient).ready() as move,
    ):
        for step in range(steps):
            check_cancelled()
            periods.turn(step, optimizer)
            micro = [next(batches) for _ in range(section.gradient_accumulation)]
            optimizer.zero_grad(set_to_none=True)
            loss = _accumulate(model, micro, rows, section, where=f"local step {step + 1} of {steps}")
            move()
            schedule.step()
            total += loss
            seen += sum(len(indices) for indices in micro)
            if on_step is not None:
                on_step(step + 1)
    optimizer.zero_grad(set_to_none=True)
    return TrainingReport(total / steps, steps, seen)


@dataclass(frozen=True)
class _Mover:
    """What makes a step of gradients: the pull to the start, clipping, the optimiser."""

    optimizer: torch.optim.Optimizer
    trained: Sequence[nn.Parameter]
    start: Sequence[Tensor]
    mu: float
    max_grad_norm: float | None
    add_gradient: Callable[[], None] | None

    @contextmanager
    def ready(self) -> Iterator[Callable[[], None]]:
        """What is called once all gradients are there."""
        yield self._move

    def _move(self) -> None:
        add_proximal_gradient(self.trained, self.start, self.mu)
        if self.add_gradient is not None:
            self.add_gradient()
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.trained, self.max_grad_norm)
        self.optimizer.step()


@dataclass(frozen=True)
class _FusedMover:
    """Moves each parameter within the backward pass, as soon as its gradient is whole, and drops it.

    At that moment no other parameter has a gradient, so that a step of the optimiser moves this one alone.
    Steps are those of `_Mover`, bit for bit.

    Source: Lv et al. 2023, "LOMO" (arXiv 2306.09782), section 3.1, here with any optimiser.
    """

    optimizer: torch.optim.Optimizer
    trained: Sequence[nn.Parameter]
    start: Sequence[Tensor]
    mu: float
    max_grad_norm: float | None  # never set: preflight refuses it
    add_gradient: Callable[[], None] | None  # likewise

    @contextmanager
    def ready(self) -> Iterator[Callable[[], None]]:
        """What is called after a backward pass has nothing left to do."""
        origins: Sequence[Tensor | None] = self.start or [None] * len(self.trained)
        hooks = [
            parameter.register_post_accumulate_grad_hook(self._hook(origin))  # type: ignore[no-untyped-call]
            for parameter, origin in zip(self.trained, origins, strict=True)
        ]
        try:
            yield lambda: None
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, origin: Tensor | None) -> Callable[[Tensor], None]:
        def move(parameter: Tensor) -> None:
            if origin is not None and parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - origin, alpha=self.mu)
            self.optimizer.step()
            parameter.grad = None

        return move


def _accumulate(
    model: nn.Module,
    micro: Sequence[NDArray[np.int64]],
    rows: Rows,
    section: TrainingSection,
    *,
    where: str,
) -> float:
    """Gradients of the mean loss over all micro-batches together; returns that loss.

    Raises:
        TrainingError: a loss isn't finite; nothing has moved by it.
    """
    device = next(model.parameters()).device
    batches = [collate(rows.encoded, indices, rows.pad_id, task=rows.task) for indices in micro]
    scored = max(1, sum(batch.tokens for batch in batches))
    total = 0.0
    for batch in batches:
        with autocast(section, device), _activations(section):
            logits = model(
                input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device)
            ).logits
        summed = LOSSES[rows.task](logits, batch.labels.to(device))
        total += float(summed.detach())
        if not math.isfinite(total):
            raise TrainingError(
                f"the training loss is {total / scored} at {where}; lower training.lr (now {section.lr:g}),"
                " set training.max_grad_norm, or look for broken rows"
            )
        (summed / scored).backward()  # type: ignore[no-untyped-call]  # torch annotates it so
    return total / scored


def add_proximal_gradient(trained: Sequence[nn.Parameter], start: Sequence[Tensor], mu: float) -> None:
    """Add ``mu * (w - w_start)`` to the gradients; nothing when `start` is empty."""
    for parameter, origin in zip(trained, start, strict=False):
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - origin, alpha=mu)


def autocast(section: TrainingSection, device: torch.device) -> AbstractContextManager[object]:
    """The precision of forward passes, as the section says."""
    if section.precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def _activations(section: TrainingSection) -> AbstractContextManager[object]:
    """Where the forward pass leaves what the backward pass reads."""
    if section.activation_offload:
        return torch.autograd.graph.save_on_cpu(pin_memory=True)
    return nullcontext()


@contextmanager
def seed_generators(device: torch.device, seed: int) -> Iterator[None]:
    """Torch's global generators, from which dropout draws, seeded within and restored after."""
    with torch.random.fork_rng(devices=[device.index] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def training_mode(model: nn.Module, section: TrainingSection, seed: int) -> Iterator[None]:
    """Dropout on, checkpointing as asked, torch's global generator seeded for dropout and restored after."""
    with seed_generators(next(model.parameters()).device, seed):
        model.train()
        try:
            with _checkpointing(model) if section.gradient_checkpointing else nullcontext():
                yield
        finally:
            model.eval()


@contextmanager
def _checkpointing(model: nn.Module) -> Iterator[None]:
    """Recompute activations in the backward pass; inputs carry gradients, as first blocks are frozen."""
    wrapped: Any = model
    caches = getattr(wrapped.config, "use_cache", False)
    wrapped.config.use_cache = False  # or transformers says each time that it turns it off
    wrapped.enable_input_require_grads()
    wrapped.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        wrapped.activation_checkpointing_disable()
        wrapped.disable_input_require_grads()
        wrapped.config.use_cache = caches
