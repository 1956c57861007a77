"""The proof repeated on the model at hand: per-example gradients against one example at a time.

A run file may give a method options that the table's test never saw (other targets, another initialisation).
So a run checks its own model once, on made-up tokens, which say nothing about anybody's rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from fedpeft.data.collate import collate
from fedpeft.data.encoded import Encoded, Task, offsets_of
from fedpeft.errors import PrivacyError
from fedpeft.training.dp_losses import EXAMPLE_LOSSES
from fedpeft.training.dp_sgd import example_gradients, per_example
from fedpeft.training.first_order import Rows

TOLERANCE = 1e-4  # of an example's whole gradient; float32 gives 1e-6, wrong gradients 1e-1
LENGTHS = (5, 9, 7)  # unequal, so that padding takes part


def verify_per_example(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], task: Task, *, vocabulary: int, labels: int = 2
) -> float:
    """Compare per-example gradients of a batch with those of single examples, dropout off.

    Args:
        vocabulary: token ids are made up below it.
        labels: class ids are made up below it.

    Returns:
        The largest error of a tensor's gradient over the norm of that example's whole gradient.

    Raises:
        PrivacyError: it exceeds `TOLERANCE`, or gradients are missing.
    """
    rows = _made_up(task, vocabulary, labels)
    with _only_trained_layers_training(model):
        together = _together(model, parameters, rows)
        worst = 0.0
        for place in range(len(LENGTHS)):
            single = _gradient(model, parameters, rows, place)
            whole = max(float(torch.stack([g.norm() for g in single.values()]).norm()), 1e-30)
            errors = [float((together[name][place] - gradient).norm()) for name, gradient in single.items()]
            worst = float(np.max([worst, *(error / whole for error in errors)]))  # np.max keeps a NaN
    if not worst <= TOLERANCE:
        raise PrivacyError(
            f"record-level privacy: per-example gradients of this model are off by {worst:.2g} of their norm;"
            f" {TOLERANCE:g} is allowed: remove peft options, or choose another peft.method"
        )
    return worst


def _together(model: nn.Module, parameters: Mapping[str, nn.Parameter], rows: Rows) -> dict[str, Tensor]:
    """Per-example gradients of all made-up rows in one batch, [B, ...] by name."""
    try:
        with per_example(model, parameters) as hooked:
            found = example_gradients(hooked, parameters, rows, rows.indices)
            return {name: sample.detach().clone() for name, sample in found.items()}
    except PrivacyError:
        raise
    except Exception as error:  # hooks on layers they don't know fail in every way
        raise PrivacyError(
            f"record-level privacy: per-example hooks fail on this model ({type(error).__name__}); choose"
            " another peft.method"
        ) from error


def _gradient(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], rows: Rows, index: int
) -> dict[str, Tensor]:
    """One example's gradient by autograd alone, without hooks."""
    batch = collate(rows.encoded, np.array([index]), rows.pad_id, task=rows.task)
    device = next(iter(parameters.values())).device
    logits = model(
        input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device)
    ).logits
    loss = EXAMPLE_LOSSES[rows.task](logits, batch.labels.to(device)).sum()
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(parameters.items(), found, strict=True)
    }


def _made_up(task: Task, vocabulary: int, labels: int) -> Rows:
    """Random rows that no client holds, always the same."""
    rng = np.random.Generator(np.random.Philox(key=0))
    encoded = Encoded(
        input_ids=rng.integers(0, vocabulary, sum(LENGTHS)).astype(np.int32),
        offsets=offsets_of(LENGTHS),
        answer_start=np.array([2, 0, 4], dtype=np.int32),
        labels=rng.integers(0, labels, len(LENGTHS)),
    )
    return Rows(encoded, np.arange(len(LENGTHS)), task, pad_id=0)


@contextmanager
def _only_trained_layers_training(model: nn.Module) -> Iterator[None]:
    """Dropout off; on only the flag that Opacus's hooks look at, of layers that hold trained parameters."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    for module in flags:
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            module.training = True
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag
