"""Integer vectors that follow one another: only what the first leaves open is sent."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import UpdateError
from fedpeft.updates.update import Arrays, layout_of
from fedpeft.v1 import update_pb2 as pb
from fedpeft.wire.checksum import SIZE, seal
from fedpeft.wire.codec import Envelope, decode, encode

integers = st.integers(-(2**62) + 1, 2**62 - 1)


def sent(arrays: Arrays) -> bytes:
    return encode(Envelope(arrays, "ab" * 32, 1, "cd" * 32, "seed-scalars", client="c", weight=1))


def walk(visits: int, seeds: int = 4096, seed: int = 0) -> Arrays:
    """What a client of FedKSeed-Pro sends: sums over its visits of scalars, their sizes, and ones."""
    rng = np.random.default_rng(seed)
    where, scalars = rng.integers(0, seeds, visits), np.rint(rng.normal(0, 300, visits)).astype(np.int64)
    arrays = {name: np.zeros(seeds, dtype=np.int64) for name in ("amounts", "magnitudes", "visits")}
    for place, scalar in zip(where, scalars, strict=True):
        arrays["amounts"][place] += scalar
        arrays["magnitudes"][place] += abs(scalar)
        arrays["visits"][place] += 1
    return arrays


@given(st.lists(st.tuples(integers, integers, integers), min_size=1, max_size=6), st.booleans())
def test_whatever_the_vectors_hold_they_come_back(rows: list[tuple[int, int, int]], known: bool) -> None:
    columns = np.array(rows, dtype=np.int64).T
    arrays = dict(zip(("amounts", "magnitudes", "visits"), columns, strict=True))
    came = decode(sent(arrays), who="x", layout=layout_of(arrays) if known else None).arrays
    assert {name: array.tolist() for name, array in came.items()} == {
        name: array.tolist() for name, array in arrays.items()
    }


def test_sizes_and_visits_cost_little_beside_the_scalars() -> None:
    arrays = walk(200)
    alone, message = len(sent({"amounts": arrays["amounts"]})), sent(arrays)
    assert len(message) < alone + 120  # names, lengths, and the few directions that were visited twice
    assert len(message) < 1024
    read = decode(message, who="x", layout=layout_of(arrays)).arrays
    assert all(np.array_equal(read[name], arrays[name]) for name in arrays)


@pytest.mark.parametrize(
    ("forge", "needle"),
    [
        (lambda m: setattr(m.projected.blocks[1], "of", "visits"), "told by 'visits'"),
        (lambda m: setattr(m.projected.blocks[1], "of", "magnitudes"), "told by 'magnitudes'"),
        (lambda m: setattr(m.projected.blocks[1], "of", "z"), "told by 'z'"),
        (lambda m: setattr(m.projected.blocks[1], "relation", 9), "in the way 9"),
    ],
)
def test_a_vector_told_by_something_else_is_refused(forge: Callable[[pb.Update], None], needle: str) -> None:
    arrays = walk(40, seeds=64)
    message = pb.Update.FromString(sent(arrays)[:-SIZE])
    assert message.projected.blocks[1].relation == pb.RELATION_SIZE
    forge(message)
    for layout in (layout_of(arrays), None):
        with pytest.raises(UpdateError, match=needle):
            decode(seal([message.SerializeToString()]), who="x", layout=layout)


def test_a_sum_beyond_the_codes_range_is_refused() -> None:
    top = np.full(2, 2**62 - 1, dtype=np.int64)
    message = pb.Update.FromString(sent({"amounts": top, "magnitudes": np.abs(top)})[:-SIZE])
    message.projected.blocks[1].amounts = message.projected.blocks[0].amounts
    with pytest.raises(UpdateError, match="reaches 2\\^62"):
        decode(seal([message.SerializeToString()]), who="x")
