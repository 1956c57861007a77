"""From token rows to padded tensors, and which rows go into which batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedpeft.data.encoded import Encoded, Indices, Task, flat_positions
from fedpeft.errors import DataError

__all__ = [
    "IGNORED",
    "Batch",
    "PromptBatch",
    "Task",
    "collate",
    "evaluation_batches",
    "prompt_batch",
    "steps_per_pass",
    "training_batches",
]

IGNORED = -100  # what torch's cross entropy leaves out


@dataclass(frozen=True)
class Batch:
    """One padded batch, B rows by T tokens of the longest row.

    Attributes:
        input_ids: int64[B, T].
        attention_mask: int64[B, T], 1 on tokens and 0 on padding.
        labels: int64[B, T] for language models, -100 where the loss does not count (prompt, padding, each
            row's first token); int64[B] class ids for classifiers. Unshifted, as `transformers` models take
            them.
        examples: B.
        tokens: how many labels count; for classifiers B.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    examples: int
    tokens: int


@dataclass(frozen=True)
class PromptBatch:
    """Prompts padded on the left, so that generation goes on from the last column; int64[B, T] each."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor


def collate(encoded: Encoded, indices: Indices, pad_id: int, *, task: Task) -> Batch:
    """Pad the rows `indices` on the right and mark what the loss counts.

    Raises:
        DataError: no rows, or a classifier's rows without class ids.
    """
    lengths = _lengths(encoded, indices)
    present = np.arange(lengths.max()) < lengths[:, None]  # [B, T]
    ids = np.full(present.shape, pad_id, dtype=np.int64)
    ids[present] = encoded.input_ids[flat_positions(encoded.offsets, indices)]
    if task == "sequence-classification":
        if encoded.labels is None:
            raise DataError("rows have no class ids; a classifier needs data.label in the run file")
        labels = encoded.labels[indices]
        tokens = len(indices)
    else:
        first = np.maximum(encoded.answer_start[indices], 1)[:, None]
        counts = present & (np.arange(present.shape[1]) >= first)
        labels = np.where(counts, ids, IGNORED)
        tokens = int(counts.sum())
    return Batch(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(present.astype(np.int64)),
        labels=torch.from_numpy(labels),
        examples=len(indices),
        tokens=tokens,
    )


def prompt_batch(encoded: Encoded, indices: Indices, pad_id: int) -> PromptBatch:
    """Pad the prompts of the rows `indices` on the left.

    Raises:
        DataError: no rows, or a row without a prompt (plain text), from which nothing can be generated.
    """
    _lengths(encoded, indices)
    lengths = encoded.answer_start[indices].astype(np.int64)
    if not lengths.all():
        raise DataError(
            "a row has no prompt to generate from; metrics on generated text need data.prompt and data.answer"
        )
    width = int(lengths.max())
    present = np.arange(width) >= (width - lengths)[:, None]  # [B, T]
    ids = np.full(present.shape, pad_id, dtype=np.int64)
    ids[present] = np.concatenate([encoded.prompt(int(index)) for index in indices])
    return PromptBatch(torch.from_numpy(ids), torch.from_numpy(present.astype(np.int64)))


def steps_per_pass(rows: int, batch_size: int) -> int:
    """Batches in one pass over `rows`, the last one possibly smaller."""
    return -(-rows // batch_size)


def training_batches(
    encoded: Encoded, indices: Indices, batch_size: int, steps: int, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Exactly `steps` batches of row indices, passing over `indices` as often as that takes.

    Each pass is shuffled anew and sees every row once; its last batch holds what is left over. With fewer
    rows than `batch_size` every batch is the whole set. The batches depend on `indices`, the sizes and the
    state of `rng` only.

    Raises:
        DataError: no rows.
    """
    _lengths(encoded, indices)
    return _passes(indices, batch_size, steps, rng)


def _passes(
    indices: Indices, batch_size: int, steps: int, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    per_pass = steps_per_pass(len(indices), batch_size)
    for step in range(steps):
        place = step % per_pass
        if place == 0:
            order = rng.permutation(indices)
        yield order[place * batch_size : (place + 1) * batch_size]


def evaluation_batches(encoded: Encoded, indices: Indices, batch_size: int) -> list[NDArray[np.int64]]:
    """Every row once, rows of like length together, the longest first so that memory peaks at once.

    Which rows share a batch depends on the arguments only: deal whole batches to workers and the padding,
    hence each row's floating-point result, is the same for any number of them.
    """
    by_length = indices[np.argsort(-encoded.lengths[indices], kind="stable")]
    return [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]


def _lengths(encoded: Encoded, indices: Indices) -> NDArray[np.int64]:
    if len(indices) == 0:
        raise DataError("a batch was asked of no rows; give the client or the test set at least one row")
    return encoded.lengths[indices]
