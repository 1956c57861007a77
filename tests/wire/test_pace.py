"""Pieces of a stream are as large as the line carries."""

from __future__ import annotations

from fedpeft.wire.pace import Pace

KIB = 1024


def test_on_a_quick_line_pieces_grow_to_what_the_other_end_accepts() -> None:
    pace = Pace(1000 * KIB)
    sizes = []
    for _ in range(4):
        sizes.append(pace.size)
        pace.took(0.01)
    assert sizes == [256 * KIB, 512 * KIB, 1000 * KIB, 1000 * KIB]


def test_on_a_slow_line_they_shrink_so_far_that_each_takes_seconds() -> None:
    pace, bytes_per_s = Pace(1024 * KIB), 8_000  # 64 kbit/s
    for _ in range(10):
        pace.took(pace.size / bytes_per_s)
    assert pace.size >= 16 * KIB
    assert pace.size / bytes_per_s < 4
    for _ in range(10):
        pace.took(100)
    assert pace.size == 16 * KIB


def test_a_receiver_of_small_pieces_gets_small_ones() -> None:
    pace = Pace(5000)
    for seconds in (0.01, 100, 100, 0.01):
        pace.took(seconds)
        assert pace.size == 5000
