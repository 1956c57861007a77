"""Rows as flat numpy arrays: a few large buffers, so that forked workers share their pages."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Task = Literal["causal-lm", "sequence-classification"]


def offsets_of(lengths: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Where rows of these lengths begin in a flat buffer, and where the last one ends: int64[N+1]."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(np.asarray(lengths, dtype=np.int64), out=offsets[1:])
    return offsets


def flat_positions(offsets: NDArray[np.int64], indices: Indices) -> NDArray[np.int64]:
    """Positions in the flat buffer of all elements of the rows `indices`, row after row."""
    lengths = np.diff(offsets)[indices]
    within = np.arange(int(lengths.sum()), dtype=np.int64) - np.repeat(offsets_of(lengths)[:-1], lengths)
    return np.repeat(offsets[indices], lengths) + within


@dataclass(frozen=True)
class Texts:
    """Many strings in one UTF-8 buffer; reads like a sequence of `str`.

    Attributes:
        data: uint8[B], the strings one after the other.
        offsets: int64[N+1], where each begins.
        cells: int32[C, 2], first character and the one behind the last of each stretch that came from a field
            of the row; what is in none of them came from a template. None: all of it came from fields.
        cell_offsets: int64[N+1], where each string's cells begin; given with `cells`.
    """

    data: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    cells: NDArray[np.int32] | None = None
    cell_offsets: NDArray[np.int64] | None = None

    @classmethod
    def pack(cls, strings: Iterable[str]) -> Texts:
        """Pack strings, one at a time."""
        builder = TextsBuilder()
        for string in strings:
            builder.add(string)
        return builder.build()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        return self.data[self.offsets[index] : self.offsets[index + 1]].tobytes().decode("utf-8")

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def cells_of(self, index: int) -> list[tuple[int, int]]:
        """Return the stretches of one string that came from fields."""
        if self.cells is None or self.cell_offsets is None:
            return [(0, len(self[index]))]
        found = self.cells[self.cell_offsets[index] : self.cell_offsets[index + 1]]
        return [(int(first), int(behind)) for first, behind in found]

    def take(self, indices: Indices) -> Texts:
        """The strings at `indices`, in that order."""
        lengths = np.diff(self.offsets)[indices]
        data, offsets = self.data[flat_positions(self.offsets, indices)], offsets_of(lengths)
        if self.cells is None or self.cell_offsets is None:
            return Texts(data, offsets)
        counts = np.diff(self.cell_offsets)[indices]
        return Texts(
            data, offsets, self.cells[flat_positions(self.cell_offsets, indices)], offsets_of(counts)
        )


class TextsBuilder:
    """Packs strings as they come."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._lengths: list[int] = []
        self._cells = array("i")
        self._cell_counts: list[int] = []

    def add(self, string: str, cells: Sequence[tuple[int, int]] | None = None) -> None:
        """Append one; lone surrogates, which JSON can hold and UTF-8 cannot, become question marks.

        Args:
            cells: stretches that came from fields; None: all of it.
        """
        for first, behind in [(0, len(string))] if cells is None else cells:
            self._cells.extend((first, behind))
        self._cell_counts.append(1 if cells is None else len(cells))
        piece = string.encode("utf-8", "replace")
        self._data += piece
        self._lengths.append(len(piece))

    def build(self) -> Texts:
        """All that was added, in order."""
        cells = np.array(self._cells, dtype=np.int32).reshape(-1, 2)
        data = np.frombuffer(bytes(self._data), dtype=np.uint8)
        return Texts(data, offsets_of(self._lengths), cells, offsets_of(self._cell_counts))


@dataclass(frozen=True)
class Encoded:
    """Token rows, flat.

    Attributes:
        input_ids: int32[T], all rows one after the other, unpadded.
        offsets: int64[N+1]; row i is ``input_ids[offsets[i]:offsets[i + 1]]``.
        answer_start: int32[N], index within the row of the first token that the loss counts; the row's prompt
            ends before it. 0: the whole row (plain text). Nothing predicts a row's first token, so it never
            counts.
        labels: int64[N] class ids for classifiers; None for language models.
        answers: the answers as text, uncut, for metrics that compare text; None without answers.
        users: int64[N], equal for rows of one person; None where nobody asked whose they are.
    """

    input_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    answer_start: NDArray[np.int32]
    labels: NDArray[np.int64] | None = None
    answers: Texts | None = None
    users: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens per row, int64[N]."""
        return np.diff(self.offsets)

    @property
    def loss_tokens(self) -> NDArray[np.int64]:
        """Tokens per row that a language model's loss counts, int64[N]."""
        return np.maximum(self.lengths - np.maximum(self.answer_start, 1), 0)

    def row(self, index: int) -> NDArray[np.int32]:
        """The token ids of one row, int32[length], a view."""
        return self.input_ids[self.offsets[index] : self.offsets[index + 1]]

    def prompt(self, index: int) -> NDArray[np.int32]:
        """The token ids before the answer, int32, a view; empty for plain text."""
        return self.row(index)[: self.answer_start[index]]

    def take(self, indices: Indices) -> Encoded:
        """The rows at `indices`, in that order, as a copy."""
        return Encoded(
            input_ids=self.input_ids[flat_positions(self.offsets, indices)],
            offsets=offsets_of(self.lengths[indices]),
            answer_start=self.answer_start[indices],
            labels=None if self.labels is None else self.labels[indices],
            answers=None if self.answers is None else self.answers.take(indices),
            users=None if self.users is None else self.users[indices],
        )
