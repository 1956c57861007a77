"""Does a model keep anything from one row to the next? Looked at on the run's own model, on made-up rows.

The bound of record-level privacy holds because what a row adds is a function of the parameters and of that
row. A layer that remembers (running statistics, frequencies that a long row stretches, a router's counts)
would make it depend on the rows before. The made-up rows say nothing about anybody's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from fedpeft.config.sections import TrainingSection
from fedpeft.data.collate import collate
from fedpeft.data.encoded import Encoded, Task, offsets_of
from fedpeft.errors import PrivacyError
from fedpeft.training.dp_losses import EXAMPLE_LOSSES
from fedpeft.training.dp_sgd import private_mode, row_gradient
from fedpeft.training.first_order import Rows

TOLERANCE = 1e-4  # of what is measured: a GPU's sums come in any order; on a CPU bits are equal
LENGTHS = (5, 9, 7)

Measure = Callable[[Rows, int], Mapping[str, Tensor]]
"""From rows and the index of one to what that row alone gives, by name."""


def verify_gradients_apart(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    section: TrainingSection,
    task: Task,
    *,
    vocabulary: int,
    labels: int = 2,
) -> float:
    """Compare each row's gradient at the very beginning with the one after the other rows, dropout on.

    Args:
        vocabulary: token ids are made up below it.
        labels: class ids are made up below it.

    Returns:
        The largest difference over the norm of that row's gradient.

    Raises:
        PrivacyError: it exceeds `TOLERANCE`, a buffer changed, or the model fails on the rows.
    """

    def gradient(rows: Rows, index: int) -> Mapping[str, Tensor]:
        with private_mode(model, section):
            return row_gradient(model, parameters, rows, index, section, step_key=0)

    return _verify(model, gradient, _draw_rows(task, vocabulary, labels))


def verify_losses_apart(model: nn.Module, task: Task, *, vocabulary: int, labels: int = 2) -> float:
    """Compare each row's loss in evaluation mode likewise, which is what zeroth-order steps measure.

    Args, Returns, Raises: as `verify_gradients_apart`.
    """
    device = next(model.parameters()).device

    def loss(rows: Rows, index: int) -> Mapping[str, Tensor]:
        batch = collate(rows.encoded, np.array([index]), rows.pad_id, task=task)
        with torch.no_grad():
            logits = model(
                input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device)
            ).logits
            return {"loss": EXAMPLE_LOSSES[task](logits, batch.labels.to(device))}

    return _verify(model, loss, _draw_rows(task, vocabulary, labels))


def _verify(model: nn.Module, measure: Measure, rows: Rows) -> float:
    """Measure all rows in two orders; see `verify_gradients_apart`."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        first = {index: measure(rows, index) for index in range(len(LENGTHS))}
        second = {index: measure(rows, index) for index in reversed(range(len(LENGTHS)))}
    except PrivacyError:
        raise
    except Exception as error:  # a model's code may fail in any way
        raise PrivacyError(
            f"record-level privacy: the model fails on one row alone ({type(error).__name__}); choose another"
            " peft.method or base"
        ) from error
    changed = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, buffers[name])]
    worst = float(np.max([_difference(found, second[index]) for index, found in first.items()]))
    if changed or not worst <= TOLERANCE:
        what = (
            f"'{changed[0]}' keeps something of each row"
            if changed
            else f"what they give differs by {worst:.2g}"
        )
        raise PrivacyError(
            f"record-level privacy: this model does not treat rows one by one ({what} once others came"
            " before); choose another peft.method or base"
        )
    return worst


def _difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """The norm of a change over what changed."""
    change = math.hypot(*(float((first[name] - second[name]).double().norm()) for name in first))
    return change / max(math.hypot(*(float(tensor.double().norm()) for tensor in first.values())), 1e-30)


def _draw_rows(task: Task, vocabulary: int, labels: int) -> Rows:
    """Random rows that no client holds, always the same."""
    rng = np.random.Generator(np.random.Philox(key=0))
    encoded = Encoded(
        input_ids=rng.integers(0, vocabulary, sum(LENGTHS)).astype(np.int32),
        offsets=offsets_of(LENGTHS),
        answer_start=np.array([2, 0, 4], dtype=np.int32),
        labels=rng.integers(0, labels, len(LENGTHS)),
    )
    return Rows(encoded, np.arange(len(LENGTHS)), task, pad_id=0)
