"""Randomness that is passed in: one independent stream per purpose, derived from the run's seed.

A stream is named by what it is for ("cohort", round 3; "batches", round 3, client "hospital-2"), so it
doesn't depend on how many streams were drawn before it, on the order of clients, or on the number of workers.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(seed: int, *name: str | int) -> int:
    """A 63-bit seed for the stream `name` of a run: bits of SHA-256 over the seed and the name."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in (seed, *name))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def stream(seed: int, *name: str | int) -> np.random.Generator:
    """A NumPy generator (Philox4x64-10) for the stream `name`."""
    return np.random.Generator(np.random.Philox(key=derive_seed(seed, *name)))
