"""Arrays that a client keeps between rounds, as records of Flower's state of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict
from numpy.typing import NDArray

MEMORY, REPLICA = "memory", "replica"  # records: its stages' memory; the global state that it holds


def arrays_in(state: RecordDict, record: str) -> dict[str, NDArray[Any]]:
    """What a record holds; nothing where there is no such record."""
    kept = state.array_records.get(record)
    return {} if kept is None else {name: array.numpy() for name, array in kept.items()}


def record_of(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """The inverse of `arrays_in`."""
    return ArrayRecord({name: Array(np.ascontiguousarray(array)) for name, array in arrays.items()})
