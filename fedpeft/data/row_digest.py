"""A fingerprint of the rows that a run reads, so that other rows are never taken for them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.data.encoded import Texts
from fedpeft.data.row_records import RowSet
from fedpeft.data.tables import RawFederated


def rows_digest(raw: RawFederated) -> str:
    """Return the SHA-256 (hex) of rows as they were read: texts, classes, persons, clients and test set.

    It covers the rows and their order, not where they lie: moved or renamed files of equal content have equal
    digests, as long as each client still has its name. One function for a simulation's rows, for the rows of
    a device and for a server's test set; whoever keeps such a digest can tell later whether rows changed.

    A digest confirms a guess of all rows together, so it belongs beside the rows and in nothing that a
    private run publishes.
    """
    hasher = hashlib.sha256(b"fedpeft rows 1\0")
    _add_names(hasher, raw.label_names)
    _add_rows(hasher, raw.rows)
    _add_names(hasher, [client.name for client in raw.clients])
    for client in raw.clients:
        _add_array(hasher, client.train)
        _add_array(hasher, client.heldout)
    _add_rows(hasher, raw.test)
    return hasher.hexdigest()


def _add_rows(hasher: hashlib._Hash, rows: RowSet | None) -> None:
    if rows is None:
        hasher.update(b"none\0")
        return
    hasher.update(b"rows\0")
    for texts in (rows.prompts, rows.answers):
        _add_array(hasher, None if texts is None else texts.offsets)
        _add_array(hasher, None if texts is None else texts.data)
    _add_array(hasher, rows.labels)
    _add_array(hasher, rows.users)


def _add_names(hasher: hashlib._Hash, names: Sequence[str]) -> None:
    texts = Texts.pack(names)
    _add_array(hasher, texts.offsets)
    _add_array(hasher, texts.data)


def _add_array(hasher: hashlib._Hash, array: NDArray[Any] | None) -> None:
    """Add type, length and bytes, so that no two sequences of arrays look alike."""
    if array is None:
        hasher.update(b"none\0")
        return
    little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
    hasher.update(f"{little.dtype.str} {len(little)}\0".encode())
    hasher.update(little.data)
