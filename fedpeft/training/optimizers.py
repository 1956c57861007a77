"""Optimisers and learning-rate schedules by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from fedpeft.config.option_tables import unknown_name
from fedpeft.config.sections import TrainingSection
from fedpeft.errors import RunFileError
from fedpeft.training.eight_bit import eight_bit
from fedpeft.training.projected_adam import ProjectedAdam

Build = Callable[[list[nn.Parameter], TrainingSection], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Build] = {
    "sgd": lambda p, s: torch.optim.SGD(p, lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay),
    "adam": lambda p, s: torch.optim.Adam(p, lr=s.lr, weight_decay=s.weight_decay),
    "adamw": lambda p, s: torch.optim.AdamW(p, lr=s.lr, weight_decay=s.weight_decay),
    "adagrad": lambda p, s: torch.optim.Adagrad(p, lr=s.lr, weight_decay=s.weight_decay),
    "adafactor": lambda p, s: torch.optim.Adafactor(p, lr=s.lr, weight_decay=s.weight_decay),
    "rmsprop": lambda p, s: torch.optim.RMSprop(p, lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay),
    "galore": lambda p, s: ProjectedAdam(
        p,
        lr=s.lr,
        weight_decay=s.weight_decay,
        rank=s.projection_rank,
        every=s.projection_every,
        scale=s.projection_scale,
    ),
    "adamw8bit": lambda p, s: eight_bit("adamw8bit", p, s),
    "paged-adamw": lambda p, s: eight_bit("paged-adamw", p, s),
    "paged-adamw8bit": lambda p, s: eight_bit("paged-adamw8bit", p, s),
}

# Share of the learning rate at local step `step` of `total`, after the warm-up.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def build_optimizer(section: TrainingSection, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """A fresh optimiser: its moments never outlive a round, since the next one starts from other weights."""
    return OPTIMIZERS[section.optimizer](list(parameters), section)


def build_schedule(section: TrainingSection, optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """Linear warm-up over `warmup_steps`, then the named schedule to the last of `steps` local steps."""
    shape, warmup = SCHEDULES[section.schedule], section.warmup_steps

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return shape((step - warmup) / max(steps - warmup, 1))

    return LambdaLR(optimizer, share)


def check_names(section: TrainingSection) -> None:
    """Refuse an optimiser or a schedule that isn't in its table.

    Raises:
        RunFileError: with both problems at once.
    """
    problems = []
    for key, table in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
        name = getattr(section, key)
        if name not in table:
            problems.append(unknown_name(f"training.{key}", name, table))
    if section.momentum and section.optimizer not in ("sgd", "rmsprop"):
        problems.append(f"training.momentum: {section.optimizer} has none; use sgd or rmsprop, or remove it")
    if problems:
        raise RunFileError("run file", problems)
