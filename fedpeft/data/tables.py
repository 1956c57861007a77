"""The rows of a federation as text: read, labelled, dealt to clients, split into training and held out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedpeft.config.sections import DataSection, PartitionerSection
from fedpeft.data.encoded import Indices, Task
from fedpeft.data.heldout import Draws, content_draws, split_heldout
from fedpeft.data.labels import LabelMap, label_map, make_label_map
from fedpeft.data.partition import Dealt
from fedpeft.data.row_records import (
    CollectedRows,
    RowRecord,
    RowSet,
    Selection,
    collect,
    read_parts,
    refuse_row,
    row_set,
)
from fedpeft.data.section_layout import make_layout, section_problems
from fedpeft.data.sources import find_files
from fedpeft.data.text_files import Reading
from fedpeft.errors import DataError


@dataclass(frozen=True)
class ClientRows:
    """One client's share, as sorted int64 indices into the rows of its federation.

    `train` may be empty: each row is held out by its own draw. `encode` sees to it where that matters.
    """

    name: str
    train: Indices
    heldout: Indices


@dataclass(frozen=True)
class RawFederated:
    """Rows as text, dealt to clients.

    Attributes:
        rows: what the clients hold.
        clients: in natural order of their names.
        test: the global test set; None stands for the clients' held-out rows together.
        label_names: by class id, empty for language models.
        unused_rows: training rows that no client holds (excluded, of small clients, or left by a
            partitioner).
        unused_clients: clients that were left out as too small or beyond `partitioner.clients`.
        bad_rows: training rows that could not be used; where rows are hidden, they are left out one by one.
        notes: what was found out about the files that a person should know.
    """

    rows: RowSet
    clients: tuple[ClientRows, ...]
    test: RowSet | None
    label_names: tuple[str, ...]
    unused_rows: int
    unused_clients: int
    bad_rows: int = 0
    notes: tuple[str, ...] = ()

    @property
    def num_labels(self) -> int | None:
        """Number of classes; None for language models."""
        return len(self.label_names) or None


@dataclass(frozen=True)
class Labelled:
    """Training rows, the label map they are under, what tells their clients apart, and what was left out."""

    rows: RowSet
    labels: LabelMap | None
    collected: CollectedRows
    bad: tuple[DataError, ...] = ()

    @property
    def label_names(self) -> tuple[str, ...]:
        """By class id; empty for language models."""
        return self.labels.names if self.labels else ()


def read_client_table(
    section: DataSection, path: Path, task: Task, seed: int, name: str, *, hides_rows: bool = False
) -> RawFederated:
    """Read the file (or folder) of the one client `name`; its own sources and partitioner play no part.

    Templates, explode, filter, limit, label map, held-out share and length limit are the run's. Whether a row
    is held out depends on `seed` and the row alone.

    Args:
        hides_rows: whether nothing may depend on a single row being there (`RunConfig.hides_rows`); then a
            client without rows is none the less a client, and a row that cannot be used is left out alone.

    Raises:
        DataError: anything wrong with the section, the file, a row or a label; also a classifier's run
            without `data.labels`, since one client's rows do not tell which classes the others have, or a
            limit where rows are hidden.
    """
    own = {"train": str(path), "test": None, "partitioner": PartitionerSection(kind="files")}
    local, reading = section.model_copy(update=own), reading_of(section, hides_rows=hides_rows)
    records = read_parts(find_files(str(path), reading))
    raw = client_table(local, records, task, seed, name, hides_rows=hides_rows)
    return replace(raw, notes=tuple(reading.notes))


def reading_of(section: DataSection, *, hides_rows: bool) -> Reading:
    """How a section says that text is read, with room for what is found out."""
    return Reading(section.encoding, section.separator, section.quoting, hides_rows)


def client_table(
    section: DataSection, records: Iterable[RowRecord], task: Task, seed: int, name: str, *, hides_rows: bool
) -> RawFederated:
    """`read_client_table` of records that are at hand; `section` is the client's own, and raises as there."""
    if task == "sequence-classification" and section.labels is None:
        raise DataError(
            "data.labels is not set, and one client's file cannot tell all classes; "
            "list them in the run file, in order"
        )
    if hides_rows and section.limit is not None:
        raise DataError(
            "data.limit would let one row decide whether another is trained on, which the run's privacy does"
            " not allow for; remove it from the run file and lower privacy.sample_rate instead"
        )
    refuse_problems(section, task)
    training = training_rows(section, task, records, hides_rows=hides_rows)
    count = len(training.rows)
    if count == 0 and not hides_rows:
        raise DataError(f"client {name} has no rows after data.filter; needs at least one")
    everything = Dealt(((name, np.arange(count, dtype=np.int64)),))
    return split(training, everything, None, section.heldout, seed)


def refuse_problems(section: DataSection, task: Task) -> None:
    """Refuse a section before a file is opened.

    Raises:
        DataError: all that is known to be wrong with it.
    """
    problems = section_problems(section, task)
    if problems:
        raise DataError("; ".join(problems))


def training_rows(
    section: DataSection, task: Task, records: Iterable[RowRecord], *, hides_rows: bool
) -> Labelled:
    """Read the training rows; without `data.labels`, a classifier's label map comes from them.

    Args:
        hides_rows: a refusal would tell about a row that cannot be used, so it is left out and counted.

    Raises:
        DataError: a row cannot be used, and rows are not hidden.
    """
    layout = make_layout(section, task)
    given = None if layout.label is None or section.labels is None else label_map(section.labels)
    bad: list[DataError] = []
    on_bad = bad.append if hides_rows else refuse_row
    collected = collect(records, layout, Selection.of_training(section), given, on_bad)
    if layout.label is None:
        return Labelled(row_set(collected, layout, None), None, collected, tuple(bad))
    labels = given or make_label_map(collected.labels)
    ids = collected.labels if given else [labels.ids[str(label)] for label in collected.labels]
    return Labelled(row_set(collected, layout, [int(label) for label in ids]), labels, collected, tuple(bad))


def _draws(training: Labelled, seed: int) -> Draws:
    """What decides for each row whether it is held out: its person's number, or its own."""
    if training.rows.users is not None:
        return content_draws(((name,) for name in training.collected.users), seed)
    rows = training.rows
    answers = [""] * len(rows) if rows.answers is None else rows.answers
    return content_draws(zip(rows.prompts, answers, _class_texts(training), strict=True), seed)


def _class_texts(training: Labelled) -> list[str]:
    """Return each row's class by its label's text; the number that a run file gives it plays no part."""
    labels, classes = training.labels, training.rows.labels
    if labels is None or classes is None:
        return [""] * len(training.rows)
    texts: dict[int, str] = {}
    for text, number in labels.ids.items():  # of labels that share a class, the first by the alphabet
        texts[number] = min(text, texts.get(number, text))
    return [texts[number] for number in classes.tolist()]


def split(training: Labelled, dealt: Dealt, test: RowSet | None, share: float, seed: int) -> RawFederated:
    """Split every client's rows and leave behind the rows that nobody holds."""
    rows, draws = training.rows, _draws(training, seed)
    held = np.sort(np.concatenate([indices for _, indices in dealt.groups]))

    def client_rows(name: str, indices: Indices) -> ClientRows:
        train, heldout = split_heldout(indices, draws[indices], share)
        return ClientRows(name, np.searchsorted(held, train), np.searchsorted(held, heldout))

    clients = tuple(client_rows(name, indices) for name, indices in dealt.groups)
    return RawFederated(
        rows=rows if len(held) == len(rows) else rows.take(held),
        clients=clients,
        test=test,
        label_names=training.label_names,
        unused_rows=len(rows) - len(held),
        unused_clients=dealt.left_out,
        bad_rows=len(training.bad),
    )
