"""The rows of a federation as text: read, labelled, dealt to clients, split into training and held out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedpeft.config import DataSection, PartitionerSection
from fedpeft.data.describe import listed
from fedpeft.data.embedded_source import embedded_parts
from fedpeft.data.encoded import Indices, Task
from fedpeft.data.heldout import Draws, content_draws, split_heldout
from fedpeft.data.labels import LabelMap, label_map, sorted_label_map
from fedpeft.data.layout import BY_COLUMN, EMBEDDED, make_layout, section_problems
from fedpeft.data.partition import Dealt, deal_by_column, deal_by_file, deal_evenly
from fedpeft.data.records import Collected, Record, RowSet, Selection, collect, read_parts, row_set
from fedpeft.data.sources import Part, find_parts
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
    """

    rows: RowSet
    clients: tuple[ClientRows, ...]
    test: RowSet | None
    label_names: tuple[str, ...]
    unused_rows: int
    unused_clients: int

    @property
    def num_labels(self) -> int | None:
        """Number of classes; None for language models."""
        return len(self.label_names) or None


@dataclass(frozen=True)
class _Labelled:
    """Training rows, the label map they are under, and what tells their clients apart."""

    rows: RowSet
    labels: LabelMap | None
    collected: Collected

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.labels.names if self.labels else ()


def read_tables(section: DataSection, task: Task, seed: int) -> RawFederated:
    """Read all rows, map labels and deal rows to clients.

    Args:
        section: the run file's `data`.
        task: of the model.
        seed: the run's; decides who gets which rows and which are held out.

    Raises:
        DataError: anything wrong with the section, a file, a row, a label or the partition.
    """
    _refuse_problems(section, task)
    if section.train == EMBEDDED:
        return _read_embedded(section, task, seed)
    parts = find_parts(section.train)
    training = _training_rows(section, task, read_parts(parts))
    dealt = _deal(section.partitioner, training.collected, parts, seed)
    test = None
    if section.test is not None:
        test = _test_rows(section, task, find_parts(section.test), training.labels)
    return _split(training, dealt, test, section.heldout, seed)


def read_client_table(
    section: DataSection, path: Path, task: Task, seed: int, name: str, *, hides_rows: bool = False
) -> RawFederated:
    """Read the file (or folder) of the one client `name`; see `fedpeft.data.federated.load_client`.

    Args:
        hides_rows: whether nothing may depend on a single row being there (`RunConfig.hides_rows`); then a
            client without rows is none the less a client.

    Raises:
        DataError: as `read_tables`; also a classifier's run without `data.labels`, or a limit where rows are
            hidden.
    """
    own = {"train": str(path), "test": None, "partitioner": PartitionerSection(kind="files")}
    local, records = section.model_copy(update=own), read_parts(find_parts(str(path)))
    return client_table(local, records, task, seed, name, hides_rows=hides_rows)


def client_table(
    section: DataSection, records: Iterable[Record], task: Task, seed: int, name: str, *, hides_rows: bool
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
    _refuse_problems(section, task)
    training = _training_rows(section, task, records)
    count = len(training.rows)
    if count == 0 and not hides_rows:
        raise DataError(f"client {name} has no rows after data.filter; needs at least one")
    everything = Dealt(((name, np.arange(count, dtype=np.int64)),))
    return _split(training, everything, None, section.heldout, seed)


def read_test_table(section: DataSection, task: Task) -> RawFederated:
    """The global test set alone, for a server whose clients hold their rows elsewhere; without one, no rows.

    Raises:
        DataError: as `read_tables`; also a classifier's run without `data.labels`.
    """
    if task == "sequence-classification" and section.labels is None:
        raise DataError(
            "data.labels is not set, and the server sees no client's rows; list them in order in the run file"
        )
    _refuse_problems(section, task)
    layout = make_layout(section, task)
    labels = None if layout.label is None or section.labels is None else label_map(section.labels)
    nobody = row_set(Collected(), layout, None if labels is None else [])
    named = section.test is not None and section.test != EMBEDDED
    test = _test_rows(section, task, find_parts(section.test), labels) if named and section.test else None
    return RawFederated(nobody, (), test, labels.names if labels else (), 0, 0)


def _refuse_problems(section: DataSection, task: Task) -> None:
    problems = section_problems(section, task)
    if problems:
        raise DataError("; ".join(problems))


def _training_rows(section: DataSection, task: Task, records: Iterable[Record]) -> _Labelled:
    """Read the training rows; without `data.labels`, a classifier's label map comes from them."""
    layout = make_layout(section, task)
    given = None if layout.label is None or section.labels is None else label_map(section.labels)
    collected = collect(records, layout, Selection.of_training(section), given)
    if layout.label is None:
        return _Labelled(row_set(collected, layout, None), None, collected)
    labels = given or sorted_label_map(collected.labels)
    ids = collected.labels if given else [labels.ids[str(label)] for label in collected.labels]
    return _Labelled(row_set(collected, layout, [int(label) for label in ids]), labels, collected)


def _test_rows(section: DataSection, task: Task, parts: Sequence[Part], labels: LabelMap | None) -> RowSet:
    layout = replace(make_layout(section, task), by=None, user=None)  # nobody trains on these rows
    collected = collect(read_parts(parts), layout, Selection.of_test(section), labels)
    rows = row_set(collected, layout, None if labels is None else [int(label) for label in collected.labels])
    if len(rows) == 0:
        raise DataError(
            f"{listed(part.source for part in parts)}: no test rows are left; "
            "check data.test_filter and data.test_limit"
        )
    return rows


def _deal(spec: PartitionerSection, collected: Collected, parts: Sequence[Part], seed: int) -> Dealt:
    if spec.kind == "files":
        return deal_by_file(collected.parts, [part.name for part in parts], spec)
    if spec.kind in BY_COLUMN:
        return deal_by_column(collected.by, spec, seed)
    return deal_evenly(len(collected.parts), spec, seed)


def _draws(training: _Labelled, seed: int) -> Draws:
    """What decides for each row whether it is held out: its person's number, or its own."""
    if training.rows.users is not None:
        return content_draws(((name,) for name in training.collected.users), seed)
    rows, labels = training.rows, training.collected.labels
    answers = [""] * len(rows) if rows.answers is None else rows.answers
    classes = map(str, labels) if labels else [""] * len(rows)
    return content_draws(zip(rows.prompts, answers, classes, strict=True), seed)


def _split(training: _Labelled, dealt: Dealt, test: RowSet | None, share: float, seed: int) -> RawFederated:
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
    )


def _read_embedded(section: DataSection, task: Task, seed: int) -> RawFederated:
    """The generator deals its rows itself and says which are held out: two parts per client."""
    parts = embedded_parts(section, seed)
    # The generator has heeded the limit already, evenly for all clients.
    training = _training_rows(section.model_copy(update={"limit": None}), task, read_parts(parts))
    of = np.asarray(training.collected.parts, dtype=np.int64)
    clients = tuple(
        ClientRows(part.name, np.flatnonzero(of == 2 * index), np.flatnonzero(of == 2 * index + 1))
        for index, part in enumerate(parts[::2])
    )
    for client in clients:
        if len(client.train) == 0:
            raise DataError(f"client {client.name} has no embedded rows after data.filter; change the filter")
    return RawFederated(training.rows, clients, None, training.label_names, 0, 0)
