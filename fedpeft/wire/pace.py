"""How large the pieces of a stream are."""

from __future__ import annotations

LEAST_BYTES = 16 * 1024  # of a piece that is not the last, unless the other end takes only smaller ones
_FIRST = 256 * 1024
_QUICK_S, _SLOW_S = 0.5, 3.0


class Pace:
    """Pieces as large as a line carries in a second or so, within bounds.

    Large pieces cost both ends less; but a piece is gone after a pause in which the other end gives up, and a
    slow line needs that long for a large one.

    Args:
        most: bytes of a piece that the other end accepts.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.size = min(most, _FIRST)

    def took(self, seconds: float) -> None:
        """A piece went in so much time: the next may be twice or half as large."""
        if seconds < _QUICK_S:
            self.size = min(self._most, 2 * self.size)
        elif seconds > _SLOW_S:
            self.size = max(min(self._most, LEAST_BYTES), self.size // 2)
