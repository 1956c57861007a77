"""Turns at something of which there is little: whoever has waited longest since its last one, and one each.

Whoever is slow keeps its turn while nobody else waits, and then until its time is over: what it was at goes
on from there when its turn comes again. So a few peers that crawl, or ask a hundred times, delay the others
by a turn each, and never stop them.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fedpeft.errors import LimitError
from fedpeft_server.transport.refusals import Reason, Refused

_REMEMBERED = 8192


@dataclass(frozen=True, eq=False)
class _Waiter:
    name: str
    called: asyncio.Future[None]


class FairQueue:
    """Used on one event loop.

    Args:
        places: turns at a time.
        turn_s: how long one lasts while others wait.
        clock: seconds that never go back.
    """

    def __init__(self, places: int, turn_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._free, self._turn_s, self._clock = places, turn_s, clock
        self._held: Counter[str] = Counter()
        self._waiting: dict[_Waiter, None] = {}  # in order of arrival
        self._count = 0
        self._served: dict[str, int] = {}  # a caller's last turn, counted; those of longest ago are forgotten

    @asynccontextmanager
    async def turn(self, name: str) -> AsyncIterator[Turn]:
        """Wait for a turn and have it."""
        waiter = _Waiter(name, asyncio.get_running_loop().create_future())
        self._waiting[waiter] = None
        self._call()
        try:
            await waiter.called
        except BaseException:  # whoever waits may be cut off, also in the instant in which it is called
            if waiter.called.done() and not waiter.called.cancelled():
                self._leave(name)
            else:
                self._waiting.pop(waiter, None)
            raise
        try:
            yield Turn(self, self._clock())
        finally:
            self._leave(name)

    def over(self, since: float) -> bool:
        """Whether a turn that began then is over: it was long enough, and someone could have the place."""
        return self._clock() - since > self._turn_s and any(self._ready())

    def _ready(self) -> Iterator[_Waiter]:
        return (waiter for waiter in self._waiting if not self._held[waiter.name])

    def _next(self) -> _Waiter | None:
        """Of those that could begin: the one whose last turn is longest ago, and the first of these."""
        return min(self._ready(), key=lambda waiter: self._served.get(waiter.name, 0), default=None)

    def _call(self) -> None:
        while self._free and (waiter := self._next()) is not None:
            del self._waiting[waiter]
            if not waiter.called.done():
                self._free -= 1
                self._held[waiter.name] += 1
                self._remember(waiter.name)
                waiter.called.set_result(None)

    def _remember(self, name: str) -> None:
        self._count += 1
        self._served.pop(name, None)
        self._served[name] = self._count
        if len(self._served) > _REMEMBERED:
            del self._served[next(iter(self._served))]

    def _leave(self, name: str) -> None:
        self._free += 1
        self._held[name] -= 1
        if not self._held[name]:
            del self._held[name]
        self._call()


@dataclass(frozen=True)
class Turn:
    """A turn that is had."""

    turns: FairQueue
    since: float

    def check(self) -> None:
        """Between two steps.

        Raises:
            Refused: it is over; what is done stays done.
        """
        if self.turns.over(self.since):
            raise Refused(
                Reason.TURN,
                LimitError("others wait and this turn was long enough; go on from here in a moment"),
            )
