"""The rows that a run file names: all clients' for a simulation, the test set for a server."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from fedpeft.config.sections import DataSection, PartitionerSection
from fedpeft.data.describe import list_names, show
from fedpeft.data.embedded_source import list_embedded_parts
from fedpeft.data.encoded import Task
from fedpeft.data.labels import LabelMap, label_map
from fedpeft.data.partition import Dealt, deal_by_column, deal_by_file, deal_evenly
from fedpeft.data.row_records import CollectedRows, RowRecord, RowSet, Selection, collect, read_parts, row_set
from fedpeft.data.run_sources import find_parts
from fedpeft.data.section_layout import BY_COLUMN, EMBEDDED, make_layout
from fedpeft.data.sources import Part
from fedpeft.data.tables import (
    ClientRows,
    Labelled,
    RawFederated,
    reading_of,
    refuse_problems,
    split,
    training_rows,
)
from fedpeft.errors import DataError


def read_tables(section: DataSection, task: Task, seed: int, *, hides_rows: bool = False) -> RawFederated:
    """Read all rows, map labels and deal rows to clients.

    Args:
        section: the run file's `data`.
        task: of the model.
        seed: the run's; decides who gets which rows and which are held out.
        hides_rows: rows that cannot be used are left out one by one, as on a device, unless all are such;
            see `fedpeft.data.tables.read_client_table`.

    Raises:
        DataError: anything wrong with the section, a file, a row, a label or the partition.
    """
    refuse_problems(section, task)
    if section.train == EMBEDDED:
        return _read_embedded(section, task, seed, hides_rows=hides_rows)
    reading = reading_of(section, hides_rows=hides_rows)
    parts = find_parts(section.train, reading)
    training = training_rows(section, task, read_parts(parts), hides_rows=hides_rows)
    if training.bad and len(training.rows) == 0:
        raise training.bad[0]
    dealt = _deal(section.partitioner, training.collected, parts, seed)
    test = None
    if section.test is not None:
        test = _test_rows(section, task, find_parts(section.test, reading, split="test"), training.labels)
    notes = list(reading.notes)
    if not hides_rows:  # there a single row must not decide whether the run is held, nor what is said
        _refuse_one_class(training)
        _refuse_empty_answers(training.rows)
        if test is not None:
            notes += _find_shared_rows(training.rows, test)
    return replace(split(training, dealt, test, section.heldout, seed), notes=tuple(notes))


def source_records(section: DataSection, seed: int) -> Iterator[RowRecord]:
    """Return the training records that a run file names, as they are read: nothing is dealt or left out.

    Raises:
        DataError: nothing is there, or a file cannot be read.
    """
    if section.train == EMBEDDED:
        return read_parts(list_embedded_parts(section, seed)[::2])
    return read_parts(find_parts(section.train))


def read_test_table(section: DataSection, task: Task) -> RawFederated:
    """The global test set alone, for a server whose clients hold their rows elsewhere; without one, no rows.

    Raises:
        DataError: as `read_tables`; also a classifier's run without `data.labels`.
    """
    if task == "sequence-classification" and section.labels is None:
        raise DataError(
            "data.labels is not set, and the server sees no client's rows; list them in order in the run file"
        )
    refuse_problems(section, task)
    layout = make_layout(section, task)
    labels = None if layout.label is None or section.labels is None else label_map(section.labels)
    nobody = row_set(CollectedRows(), layout, None if labels is None else [])
    named = section.test is not None and section.test != EMBEDDED
    reading = reading_of(section, hides_rows=False)
    test = None
    if named and section.test:
        test = _test_rows(section, task, find_parts(section.test, reading, split="test"), labels)
    return RawFederated(nobody, (), test, labels.names if labels else (), 0, 0, notes=tuple(reading.notes))


def _refuse_one_class(training: Labelled) -> None:
    """Refuse to train a classifier on rows of one class, which is always right and has learned nothing.

    Raises:
        DataError: naming the class.
    """
    classes = training.rows.labels
    if classes is not None and len(classes) and len(np.unique(classes)) == 1:
        name = training.label_names[int(classes[0])]
        raise DataError(
            f"all {len(classes)} training rows have one class only, {show(name)}, which teaches nothing; "
            "check data.label, data.filter and data.limit (a file may be sorted by class)"
        )


def _refuse_empty_answers(rows: RowSet) -> None:
    """Refuse rows that teach an end token alone.

    Raises:
        DataError: all answers are empty.
    """
    if rows.answers is not None and len(rows) and not len(rows.answers.data):
        raise DataError(
            f"all {len(rows)} answers are empty, so nothing but an end would be learned; check"
            " data.answer, and the field that it names"
        )


def _find_shared_rows(training: RowSet, test: RowSet) -> list[str]:
    """One line where rows of the test set are training rows too, wherever they were read from."""
    seen = set(_row_digests(training))
    shared = sum(digest in seen for digest in _row_digests(test))
    if not shared:
        return []
    which = f"all {shared:,}" if shared == len(test) else f"{shared:,} of {len(test):,}"
    return [
        f"data.test: {which} rows are training rows too, so scores on them say how well rows are remembered;"
        " name other rows, or leave data.test out and rows are held out"
    ]


def _row_digests(rows: RowSet) -> Iterator[bytes]:
    """16 bytes for each row's texts: a set of them is small beside the rows."""
    for index in range(len(rows)):
        answer = "" if rows.answers is None else rows.answers[index]
        text = f"{len(rows.prompts[index])}:{rows.prompts[index]}{answer}"
        yield hashlib.blake2b(text.encode(), digest_size=16).digest()


def _test_rows(section: DataSection, task: Task, parts: Sequence[Part], labels: LabelMap | None) -> RowSet:
    layout = replace(make_layout(section, task), by=None, user=None)  # nobody trains on these rows
    collected = collect(read_parts(parts), layout, Selection.of_test(section), labels)
    rows = row_set(collected, layout, None if labels is None else [int(label) for label in collected.labels])
    if len(rows) == 0:
        raise DataError(
            f"{list_names(part.source for part in parts)}: no test rows are left; "
            "check data.test_filter and data.test_limit"
        )
    return rows


def _deal(spec: PartitionerSection, collected: CollectedRows, parts: Sequence[Part], seed: int) -> Dealt:
    if spec.kind == "files":
        return deal_by_file(collected.parts, [(part.name, part.owner or part.source) for part in parts], spec)
    if spec.kind in BY_COLUMN:
        return deal_by_column(collected.by, spec, seed)
    return deal_evenly(len(collected.parts), spec, seed)


def _read_embedded(section: DataSection, task: Task, seed: int, *, hides_rows: bool) -> RawFederated:
    """The generator deals its rows itself and says which are held out: two parts per client."""
    parts = list_embedded_parts(section, seed)
    # The generator has heeded the limit already, evenly for all clients.
    unlimited = section.model_copy(update={"limit": None})
    training = training_rows(unlimited, task, read_parts(parts), hides_rows=hides_rows)
    of = np.asarray(training.collected.parts, dtype=np.int64)
    clients = tuple(
        ClientRows(part.name, np.flatnonzero(of == 2 * index), np.flatnonzero(of == 2 * index + 1))
        for index, part in enumerate(parts[::2])
    )
    for client in clients:
        if len(client.train) == 0:
            raise DataError(f"client {client.name} has no embedded rows after data.filter; change the filter")
    return RawFederated(training.rows, clients, None, training.label_names, 0, 0)
