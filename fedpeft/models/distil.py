"""Distilling an emulator: its middle learns to hand the last layers what the full model's middle hands them.

The mean squared distance between the two hidden states before the last outer layers is lowered by Adam on the
rows of a public text; only middle layers move.

Source: Xiao, Lin, Han 2023, section 3.3, without the language-modelling term: texts needn't be of the task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedpeft.errors import ModelError
from fedpeft.models.offsite import Emulator

ROWS, TOKENS, LR = 8, 128, 1e-4


def distil(
    student: nn.Module,
    teacher: nn.Module,
    emulator: Emulator,
    lines: Sequence[Sequence[int]],
    *,
    steps: int,
    rng: np.random.Generator,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[float, float]:
    """Train the middle of `student` in place; the distance in the first and in the last step.

    Args:
        student: the emulator, as `whole_model` loads it.
        teacher: the full model.
        lines: public texts as token ids; each is cut to `TOKENS`.

    Raises:
        ModelError: no line has two tokens, or there is no step.
    """
    usable = [line[:TOKENS] for line in lines if len(line) > 1]
    if not usable or steps < 1:
        raise ModelError(f"{len(usable)} usable lines and {steps} steps came; distilling needs some of both")
    layers: Any = student.get_submodule(emulator.layers)
    middle = [
        parameter
        for number, layer in enumerate(layers)
        if number not in emulator.outer
        for parameter in layer.parameters()
    ]
    for parameter in middle:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(middle, lr=LR)
    losses = []
    for step, batch in enumerate(_batches(usable, steps, rng), start=1):
        loss = _distance(student, teacher, emulator, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch annotates it so
        optimizer.step()
        losses.append(float(loss.detach()))
        on_step(step, losses[-1])
    student.requires_grad_(False)
    return losses[0], losses[-1]


def _batches(
    lines: Sequence[Sequence[int]], steps: int, rng: np.random.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and attention mask, [rows, longest]."""
    for _ in range(steps):
        chosen = [lines[int(i)] for i in rng.integers(0, len(lines), ROWS)]
        longest = max(len(line) for line in chosen)
        ids = torch.zeros(ROWS, longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for place, line in enumerate(chosen):
            ids[place, : len(line)] = torch.tensor(line)
            mask[place, : len(line)] = 1
        yield ids, mask


def _distance(
    student: nn.Module, teacher: nn.Module, emulator: Emulator, batch: tuple[Tensor, Tensor]
) -> Tensor:
    """Mean squared distance of the hidden states that enter the last outer layers, over real tokens."""
    ids, mask = batch
    inputs = {"input_ids": ids, "attention_mask": mask, "output_hidden_states": True}
    with torch.no_grad():
        wanted = teacher(**inputs).hidden_states[emulator.depth - emulator.pad]
    came = student(**inputs).hidden_states[len(emulator.kept) - emulator.pad]
    squares: Tensor = ((came - wanted) ** 2).mean(-1)
    return squares[mask.bool()].mean()
