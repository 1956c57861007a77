"""From streams of rows to texts and labels: explode, filter, limit, templates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.config.sections import DataSection
from fedpeft.data.columns import ClassName
from fedpeft.data.describe import list_names, show
from fedpeft.data.encoded import Indices, Texts, TextsBuilder
from fedpeft.data.labels import LabelMap, plain_value
from fedpeft.data.sources import Part
from fedpeft.data.templates import Template
from fedpeft.errors import DataError

Scalar = str | int | float | bool


@dataclass(frozen=True)
class RowRecord:
    """One row: which part it comes from, its number there, its fields."""

    part: int
    source: str
    number: int
    fields: Mapping[str, Any]

    @property
    def where(self) -> str:
        """The place, as a message begins."""
        return f"{self.source}: row {self.number}"


@dataclass(frozen=True)
class Layout:
    """How a row becomes text.

    Attributes:
        prompt: what comes before the answer; without `answer`, the whole text.
        answer: what the loss is on; None for plain text and for classifiers.
        label: field of a classifier's label; None for language models.
        by: field that tells clients or classes apart for the partitioner; None where it needs none.
        user: field that tells persons apart; None where nobody asks.
    """

    prompt: Template
    answer: Template | None = None
    label: str | None = None
    by: str | None = None
    user: str | None = None


@dataclass(frozen=True)
class Selection:
    """Which rows count: one row per item of a list, then those whose fields equal these, then the first."""

    explode: str | None = None
    filter: Mapping[str, Scalar] | None = None
    limit: int | None = None

    @classmethod
    def of_training(cls, section: DataSection) -> Selection:
        """For `data.train`."""
        return cls(section.explode, section.filter, section.limit)

    @classmethod
    def of_test(cls, section: DataSection) -> Selection:
        """For `data.test`."""
        return cls(section.explode, section.test_filter, section.test_limit)


@dataclass(frozen=True)
class RowSet:
    """Rows as text; `answers` is None for plain text, `labels` (int64[N]) for language models.

    `users` (int64[N]) is equal for rows of one person; None where the run doesn't tell persons apart.
    """

    prompts: Texts
    answers: Texts | None
    labels: NDArray[np.int64] | None
    users: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, indices: Indices) -> RowSet:
        """The rows at `indices`, in that order."""
        return RowSet(
            self.prompts.take(indices),
            None if self.answers is None else self.answers.take(indices),
            None if self.labels is None else self.labels[indices],
            None if self.users is None else self.users[indices],
        )


@dataclass
class CollectedRows:
    """What one pass over a source leaves, row by row."""

    prompts: TextsBuilder = field(default_factory=TextsBuilder)
    answers: TextsBuilder = field(default_factory=TextsBuilder)
    labels: list[str | int] = field(default_factory=list)
    by: list[str | int] = field(default_factory=list)
    users: list[str] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)


OnBadRow = Callable[[DataError], None]
"""Told of a row that cannot be used; if it returns, that row alone is left out."""


def refuse_row(error: DataError) -> None:
    """Read nothing where one row cannot be used.

    Raises:
        DataError: always.
    """
    raise error


def read_parts(parts: Iterable[Part]) -> Iterator[RowRecord]:
    """The rows of all parts, one part after the other."""
    for index, part in enumerate(parts):
        for number, fields in part.rows():
            yield RowRecord(index, part.source, number, fields)


def collect(
    records: Iterable[RowRecord],
    layout: Layout,
    selection: Selection,
    labels: LabelMap | None,
    on_bad: OnBadRow = refuse_row,
) -> CollectedRows:
    """Read, select and render.

    Args:
        records: the stream.
        layout: templates and columns.
        selection: which rows count.
        labels: a known label map turns labels into class ids at once; without one they are kept as they are.

    Raises:
        DataError: a row lacks a field, or its label is outside the map; raised by `on_bad`.
    """
    out = CollectedRows()
    for record in select(records, selection, on_bad):
        try:
            _add(out, record, layout, labels)
        except DataError as error:
            on_bad(error)
    return out


def _add(out: CollectedRows, record: RowRecord, layout: Layout, labels: LabelMap | None) -> None:
    """Add one row, or nothing of it.

    Raises:
        DataError: it lacks a field, or its label is outside the map.
    """

    def value(name: str) -> str | int:
        return plain_value(record.fields.get(name), name, record.where)

    prompt = layout.prompt.render(record.fields, record.where)
    answer = None if layout.answer is None else layout.answer.render(record.fields, record.where)
    label = None if layout.label is None else value(layout.label)
    if label is not None and labels is not None and layout.label is not None:
        label = labels.class_id(label, layout.label, record.where)
    by = None if layout.by is None else value(layout.by)
    user = None if layout.user is None else str(value(layout.user))
    out.parts.append(record.part)
    out.prompts.add(prompt.text, prompt.cells)
    if answer is not None:
        out.answers.add(answer.text, answer.cells)
    if label is not None:
        out.labels.append(label)
    if by is not None:
        out.by.append(by)
    if user is not None:
        out.users.append(user)


def row_set(collected: CollectedRows, layout: Layout, class_ids: Sequence[int] | None) -> RowSet:
    """The collected texts, packed, with class ids where there are any."""
    return RowSet(
        prompts=collected.prompts.build(),
        answers=None if layout.answer is None else collected.answers.build(),
        labels=None if class_ids is None else np.array(class_ids, dtype=np.int64),
        users=None if layout.user is None else _number(collected.users),
    )


def _number(names: Sequence[str]) -> NDArray[np.int64]:
    """Equal numbers for equal names, int64[N]."""
    # Not by numpy: each of its strings takes as much room as the longest.
    number = {name: index for index, name in enumerate(sorted(set(names)))}
    return np.array([number[name] for name in names], dtype=np.int64)


def select(
    records: Iterable[RowRecord], selection: Selection, on_bad: OnBadRow = refuse_row
) -> Iterator[RowRecord]:
    """The records that count.

    Raises:
        DataError: a row lacks a field that the selection needs; raised by `on_bad`.
    """
    wanted = selection.filter or {}

    def counts(record: RowRecord) -> bool:
        try:
            return _matches(record, wanted)
        except DataError as error:
            on_bad(error)
            return False

    return islice(filter(counts, _explode(records, selection.explode, on_bad)), selection.limit)


def _explode(records: Iterable[RowRecord], name: str | None, on_bad: OnBadRow) -> Iterator[RowRecord]:
    if name is None:
        yield from records
        return
    for record in records:
        items = record.fields.get(name)
        if not isinstance(items, list):
            problem = f"field '{name}', which data.explode names, is {show(items)}; needs a list"
            on_bad(DataError(f"{record.where}: {problem}"))
            continue
        for item in items:
            yield RowRecord(record.part, record.source, record.number, {**record.fields, name: item})


def _matches(record: RowRecord, wanted: Mapping[str, Scalar]) -> bool:
    for name, value in wanted.items():
        if name not in record.fields:
            raise DataError(
                f"{record.where}: has no field '{name}', which the run file filters by; "
                f"it has {list_names(record.fields)}"
            )
        found = record.fields[name]
        if not _equals(found, value):
            return False
    return True


def _equals(found: object, wanted: Scalar) -> bool:
    """Whether a row's value is the run file's: CSV files write 3 as "3" and true as they like."""
    if found == wanted:
        return True
    if isinstance(found, ClassName) and found.number == wanted:
        return True
    if isinstance(found, str) and isinstance(wanted, bool):
        return found.lower() == str(wanted).lower()
    return isinstance(found, str) and found == str(wanted)
