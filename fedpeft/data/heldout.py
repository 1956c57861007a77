"""Each client's own held-out rows."""

from __future__ import annotations

import hashlib

import numpy as np

from fedpeft.data.encoded import Indices


def heldout_count(rows: int, share: float) -> int:
    """Rows to hold out: the rounded share, at least one where a share is asked for, never the last row."""
    return min(rows - 1, max(1, round(rows * share))) if share > 0 else 0


def split_heldout(indices: Indices, share: float, seed: int, name: str) -> tuple[Indices, Indices]:
    """Split one client's rows into (train, held out), both sorted.

    Which positions are held out depends on `seed`, `name` and the number of rows alone, so that a device
    splits its own file just as a simulation does, whatever the other clients are.
    """
    digest = hashlib.sha256(name.encode()).digest()
    rng = np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])
    order = rng.permutation(len(indices))
    cut = heldout_count(len(indices), share)
    return np.sort(indices[order[cut:]]), np.sort(indices[order[:cut]])
