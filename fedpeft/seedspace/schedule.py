"""How K integer amounts become a fixed list of bit-sliced additions.

The sum wanted is S = sum_k A_k z_k with z_k = 2 b_k - 1 and b_k the sign bits. Where A_k < 0 the bits are
complemented, so S = 2 T - sum_k |A_k| with T = sum_k |A_k| b_k, all terms non-negative. T is summed in
binary without leaving bits: |A_k| puts the row b_k into each column j whose bit is set in |A_k|, and a
carry-save adder takes eight rows of one column at a time into the planes j, j+1, j+2 and one carry row of
column j+3. One such addition serves as many coordinates as rows have bits, and its course depends on the
amounts alone, never on the coordinates: it is planned once here and run for every tile of every tensor.

Source: the carry-save counter of Harley and Seal (Warren, "Hacker's Delight", 2nd ed., section 5-1), here
with weighted inputs and with the planes kept instead of a final population count.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

DIRECTIONS_PER_CHUNK = 128
ROWS_PER_ADDITION = 8
CARRY_COLUMNS = 3


@dataclass(frozen=True, slots=True)
class Schedule:
    """The additions for one vector of amounts.

    `additions` is int32 [n, 10]: eight input rows, the column, the row that takes the carry. Those of chunk
    c are `additions[edges[c]:edges[c + 1]]`; the chunk's own directions fill the rows from 0. `flips` is
    all ones for a negative amount. `total` is sum |A_k|, `planes` how many bits it has.
    """

    directions: NDArray[np.uint64]
    flips: NDArray[np.uint64]
    additions: NDArray[np.int32]
    edges: NDArray[np.int64]
    rows: int
    planes: int
    total: int


@lru_cache(maxsize=8)
def schedule_of(directions: bytes, amounts: bytes) -> Schedule:
    """The schedule for int64 `directions` and `amounts`, as bytes so that equal vectors are planned once."""
    which = np.frombuffer(directions, dtype=np.int64)
    signed = np.frombuffer(amounts, dtype=np.int64)
    used = np.flatnonzero(signed)
    which, signed = which[used], signed[used]
    magnitudes = np.abs(signed)
    total = sum(magnitudes.tolist())
    planes = total.bit_length()
    chunks = [
        _chunk(magnitudes[first : first + DIRECTIONS_PER_CHUNK], planes)
        for first in range(0, len(magnitudes), DIRECTIONS_PER_CHUNK)
    ]
    counts = [len(chunk) for chunk in chunks]
    additions = np.concatenate(chunks) if chunks else np.zeros((0, 10), dtype=np.int32)
    return Schedule(
        directions=which.astype(np.uint64),
        flips=np.where(signed < 0, np.uint64(2**64 - 1), np.uint64(0)),
        additions=np.ascontiguousarray(additions, dtype=np.int32),
        edges=np.cumsum([0, *counts], dtype=np.int64),
        rows=DIRECTIONS_PER_CHUNK + 1 + max(counts, default=0),
        planes=planes,
        total=total,
    )


def _chunk(magnitudes: NDArray[np.int64], planes: int) -> NDArray[np.int32]:
    """Additions for one chunk, columns ascending, so that every carry row is written before it is read.

    Row DIRECTIONS_PER_CHUNK is all zeros and fills up the last addition of a column. Addition n writes its
    carry to row DIRECTIONS_PER_CHUNK + 1 + n. A carry above the top plane is zero, since T <= total <
    2^planes, and is not read again.
    """
    zero = DIRECTIONS_PER_CHUNK
    columns: list[list[int]] = [
        np.flatnonzero((magnitudes >> column) & 1).tolist() for column in range(planes)
    ]
    additions: list[list[int]] = []
    for column, inputs in enumerate(columns):
        for first in range(0, len(inputs), ROWS_PER_ADDITION):
            rows = inputs[first : first + ROWS_PER_ADDITION]
            carry = zero + 1 + len(additions)
            additions.append([*rows, *[zero] * (ROWS_PER_ADDITION - len(rows)), column, carry])
            if column + CARRY_COLUMNS < planes:
                columns[column + CARRY_COLUMNS].append(carry)
    return np.array(additions, dtype=np.int32).reshape(-1, ROWS_PER_ADDITION + 2)
