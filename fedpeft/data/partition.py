"""Dealing rows to clients with the partitioners of `flwr_datasets`."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedpeft.config.sections import PartitionerSection
from fedpeft.data.describe import list_names
from fedpeft.data.encoded import Indices
from fedpeft.data.labels import natural_key
from fedpeft.errors import DataError

CODE = "code"  # the column that partitioners look at: each value of `by` as a small integer
ROW = "row"


@dataclass(frozen=True)
class Dealt:
    """Who holds which rows.

    Attributes:
        groups: (client, sorted int64 row indices), in natural order of the clients' names.
        left_out: clients that were too small or beyond the wanted number.
    """

    groups: tuple[tuple[str, Indices], ...]
    left_out: int = 0


def deal_by_column(by: Sequence[str | int], spec: PartitionerSection, seed: int) -> Dealt:
    """Deal rows whose partitioner looks at a column.

    Args:
        by: that column's value for each row; rows whose value is in `spec.exclude` go to nobody.
        spec: kind natural, dirichlet, pathological or shard, with its options.
        seed: of the assignment.

    Raises:
        DataError: the rows cannot be dealt so.
    """
    excluded = {str(value) for value in spec.exclude}
    kept = np.array([i for i, value in enumerate(by) if str(value) not in excluded], dtype=np.int64)
    names = sorted({str(by[i]) for i in kept}, key=natural_key)
    code_of = {name: code for code, name in enumerate(names)}
    codes = np.array([code_of[str(by[i])] for i in kept], dtype=np.int64)
    groups = _run_partitioner(spec, seed, kept, codes)
    if spec.kind == "natural":
        return _keep_large(list(zip(names, groups, strict=True)), spec)
    return _number(groups, spec)


def deal_evenly(rows: int, spec: PartitionerSection, seed: int) -> Dealt:
    """Deal rows by number alone: iid, linear, square, exponential.

    Raises:
        DataError: too few rows for so many clients.
    """
    return _number(
        _run_partitioner(spec, seed, np.arange(rows, dtype=np.int64), np.zeros(rows, dtype=np.int64)), spec
    )


def deal_by_file(parts: Sequence[int], owners: Sequence[tuple[str, str]], spec: PartitionerSection) -> Dealt:
    """Deal each file's rows to a client of its name, or of its folder's.

    Args:
        parts: for each row the index of its file.
        owners: (client's name, what tells clients apart) of each file, also of those without rows.
        spec: kind files; `clients` and `min_rows` count.

    Raises:
        DataError: two files of one name, or a file without rows.
    """
    clients = list(dict.fromkeys(owners))
    names = [name for name, _ in clients]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise DataError(
            f"two files would both be client {list_names(sorted(twice))}; rename one, a file names its client"
        )
    number = np.array([clients.index(owner) for owner in owners], dtype=np.int64)
    of = number[np.asarray(parts, dtype=np.int64)]
    return _keep_large([(name, np.flatnonzero(of == index)) for index, name in enumerate(names)], spec)


def _keep_large(groups: list[tuple[str, Indices]], spec: PartitionerSection) -> Dealt:
    """Clients that exist by themselves: drop the small ones, keep the largest of the rest."""
    empty = [name for name, rows in groups if len(rows) == 0]
    if empty and spec.min_rows == 1:
        raise DataError(
            f"client {list_names(empty)} has no rows after data.filter and data.limit; "
            "remove its file, or set data.partitioner.min_rows to 2 to leave such clients out"
        )
    large = [group for group in groups if len(group[1]) >= spec.min_rows]
    if not large:
        raise DataError(
            f"no client has {spec.min_rows} rows (data.partitioner.min_rows), the largest has "
            f"{max((len(rows) for _, rows in groups), default=0)}; lower it, or check data.filter and exclude"
        )
    largest = sorted(large, key=lambda group: (-len(group[1]), natural_key(group[0])))[: spec.clients]
    return Dealt(tuple(sorted(largest, key=lambda group: natural_key(group[0]))), len(groups) - len(largest))


def _number(groups: Sequence[Indices], spec: PartitionerSection) -> Dealt:
    """Name clients that a partitioner made up, after checking that none is too small."""
    width = len(str(len(groups) - 1))
    dealt = tuple((f"client-{index:0{width}d}", rows) for index, rows in enumerate(groups))
    for name, rows in dealt:
        if len(rows) < spec.min_rows:
            raise DataError(
                f"{name} of {len(groups)} got {len(rows)} rows from partitioner '{spec.kind}', and needs "
                f"{spec.min_rows}; take fewer clients, more rows, or another seed"
            )
    return Dealt(dealt)


def _run_partitioner(spec: PartitionerSection, seed: int, rows: Indices, codes: Indices) -> list[Indices]:
    """Sorted row indices by partition. Rows are shuffled before, since partitioners cut contiguous pieces."""
    import datasets  # costs more than a second to import

    if len(rows) == 0:
        raise DataError(
            "no training rows are left to deal to clients; check data.filter, data.limit and exclude"
        )
    if spec.kind != "natural" and len(rows) < (spec.clients or 0) * spec.min_rows:
        raise DataError(
            f"{len(rows)} training rows are too few for {spec.clients} clients of at least {spec.min_rows}; "
            "take fewer clients, or check data.filter, data.limit and exclude"
        )
    order = np.random.default_rng([seed, 0]).permutation(len(rows))
    table = datasets.Dataset.from_dict({ROW: rows[order], CODE: codes[order]})
    # They write a progress bar to stderr and warn about repeated draws, which our checks after them cover.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            partitioner = _partitioners()[spec.kind](spec, seed)
            partitioner.dataset = table
            count = partitioner.num_partitions
            return [
                np.sort(np.array(partitioner.load_partition(i)[ROW], dtype=np.int64)) for i in range(count)
            ]
        except (ValueError, ZeroDivisionError, IndexError) as error:
            raise DataError(
                f"partitioner '{spec.kind}' cannot deal {len(rows)} rows to {spec.clients} clients "
                f"({_first_sentence(error)}); change its options, or take fewer clients or more rows"
            ) from error


def _first_sentence(error: Exception) -> str:
    if isinstance(error, ZeroDivisionError):
        return "fewer rows than shards"
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")


def _partitioners() -> Mapping[str, Callable[[PartitionerSection, int], Any]]:
    """Flower's partitioner by our name for it."""
    from flwr_datasets import partitioner as flower

    return {
        "iid": lambda spec, seed: flower.IidPartitioner(spec.clients),
        "linear": lambda spec, seed: flower.LinearPartitioner(spec.clients),
        "square": lambda spec, seed: flower.SquarePartitioner(spec.clients),
        "exponential": lambda spec, seed: flower.ExponentialPartitioner(spec.clients),
        "dirichlet": lambda spec, seed: flower.DirichletPartitioner(
            spec.clients, CODE, float(spec.alpha), min_partition_size=spec.min_rows, seed=seed
        ),
        "pathological": lambda spec, seed: flower.PathologicalPartitioner(
            spec.clients,
            CODE,
            spec.classes_per_client,
            class_assignment_mode="first-deterministic",
            seed=seed,
        ),
        "shard": lambda spec, seed: flower.ShardPartitioner(
            spec.clients, CODE, num_shards_per_partition=spec.shards_per_client, seed=seed
        ),
        "natural": lambda spec, seed: flower.NaturalIdPartitioner(CODE),
    }
