"""Each client's own held-out rows, chosen row by row.

Whether a row is held out is a function of the run's seed and of what the row says, or of the person's name
where `data.user` tells persons apart. Neither its position nor any other row has a part in it, so that adding
a row (or a person) to a client's data moves nothing but itself: what record-level privacy accounts for. It
follows that rows of equal content are all held out or all trained on, at every client, and that a share is
met on average only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from fedpeft.data.encoded import Indices

Draws = NDArray[np.uint64]
_LENGTH_BYTES = 8


def content_draws(contents: Iterable[tuple[str, ...]], seed: int) -> Draws:
    """Return one uniform 64-bit number per content, uint64[N]: equal for equal contents under one seed.

    A keyed BLAKE2b of the strings with their lengths in front, so that no two tuples read alike. The key is
    the run's seed, which is public: whoever knows a row can tell on which side it is, and nothing about any
    other.
    """
    key = hashlib.sha256(f"fedpeft held-out rows {seed}".encode()).digest()
    numbers = bytearray()
    for content in contents:
        hasher = hashlib.blake2b(key=key, digest_size=8)
        for text in content:
            data = text.encode("utf-8", "replace")
            hasher.update(len(data).to_bytes(_LENGTH_BYTES, "little"))
            hasher.update(data)
        numbers += hasher.digest()
    return np.frombuffer(bytes(numbers), dtype="<u8").astype(np.uint64)


def split_heldout(indices: Indices, draws: Draws, share: float) -> tuple[Indices, Indices]:
    """Split one client's rows into (train, held out), in their order.

    Args:
        indices: int64[M], of the client's rows.
        draws: uint64[M], one per row; below `share` of their range a row is held out.
        share: of rows to hold out, on average; below 1.
    """
    held = draws < np.uint64(int(share * 2.0**64))
    return indices[~held], indices[held]
