"""Warnings that would come every second while something lasts, such as a server or database that is away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

EVERY_S = 60.0


class Repeats:
    """Says of each kind of warning whether it is due; from any thread.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._said_s: dict[str, float] = {}

    def due(self, kind: str) -> bool:
        """Whether nothing of this kind was said for a minute; from now on it was."""
        now = self._clock()
        with self._lock:
            if now - self._said_s.get(kind, -EVERY_S) < EVERY_S:
                return False
            self._said_s[kind] = now
        return True

    def clear(self) -> None:
        """All that was warned of is over."""
        with self._lock:
            self._said_s.clear()

    def over(self, kind: str) -> bool:
        """What was warned of is over: the next one is due at once; whether anything was said of it."""
        with self._lock:
            return self._said_s.pop(kind, None) is not None
