"""Streams are named, stable and different."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.runtime.randomness import derive_seed, stream


def test_seeds_are_bits_of_sha256_over_seed_and_name() -> None:
    digest = hashlib.sha256(b"int:7\x1fstr:batches\x1fint:3\x1fstr:hospital-2").digest()
    expected = int.from_bytes(digest[:8], "little") // 2
    assert derive_seed(7, "batches", 3, "hospital-2") == expected


def test_runs_of_other_releases_are_repeated() -> None:
    """Pinned: a change here changes every published run."""
    assert derive_seed(0, "cohort", 1) == 7780233164996096747
    assert stream(0, "cohort", 1).integers(0, 1000, 4).tolist() == [196, 323, 326, 252]


@given(st.integers(0, 2**63 - 1), st.lists(st.text(max_size=4) | st.integers(), max_size=3))
def test_seeds_fit_every_generator(seed: int, name: list[str | int]) -> None:
    assert 0 <= derive_seed(seed, *name) < 2**63


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((0, "a"), (1, "a")),
        ((0, "a", 1), (0, "a", "1")),
        ((0, "a", "b"), (0, "ab")),
        ((0, "a", "b"), (0, "a\x1fstr:b")),
        ((0, "a\x1f"), (0, "a\\x1f")),
        ((0, 1, 2), (0, 2, 1)),
    ],
)
def test_different_names_are_different_streams(
    left: tuple[str | int, ...], right: tuple[str | int, ...]
) -> None:
    def seed_of(name: tuple[str | int, ...]) -> int:
        return derive_seed(int(name[0]), *name[1:])

    assert seed_of(left) != seed_of(right)


def test_a_stream_does_not_depend_on_others_or_on_global_state() -> None:
    first = stream(3, "cohort", 1).random(4)
    np.random.default_rng().random(10)
    stream(3, "cohort", 2).random(4)
    assert np.array_equal(first, stream(3, "cohort", 1).random(4))
