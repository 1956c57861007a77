"""Randomness that is passed in: one independent stream per purpose, derived from the run's seed.

A stream is named by what it is for ("cohort", round 3; "batches", round 3, client "hospital-2"), so it
doesn't depend on how many streams were drawn before it, on the order of clients, or on the number of workers.
"""

from __future__ import annotations

import hashlib

import numpy as np

_SEPARATOR = "\x1f"  # ASCII's unit separator


def derive_seed(seed: int, *name: str | int) -> int:
    """A 63-bit seed for the stream `name` of a run: bits of SHA-256 over the seed and the name."""
    text = _SEPARATOR.join(f"{type(part).__name__}:{_escape(part)}" for part in (seed, *name))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def _escape(part: str | int) -> str:
    """The part without the separator, so that no client's name can run into the next part."""
    return str(part).replace("\\", "\\\\").replace(_SEPARATOR, "\\x1f")


def stream(seed: int, *name: str | int) -> np.random.Generator:
    """A NumPy generator (Philox4x64-10) for the stream `name`."""
    return np.random.Generator(np.random.Philox(key=derive_seed(seed, *name)))
