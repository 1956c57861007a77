"""Messages out, replies in as they come, on any grid."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Protocol, runtime_checkable

from flwr.app import Message
from flwr.serverapp import Grid

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.01, 1.0
WAITING_S = 0.1  # a pull that came back empty after so long has waited


@runtime_checkable
class Cancels(Protocol):
    """A grid that can take messages back; Flower's own cannot."""

    def cancel(self, message_ids: Iterable[str]) -> None:
        """Nobody waits for these any more."""
        ...


@runtime_checkable
class Spares(Protocol):
    """A grid that takes in no more answers of a round than there are places for; Flower's own take all."""

    def free_place(self, round_: int, client: str) -> None:
        """An answer that it took does not count: another one may have its place."""
        ...


@runtime_checkable
class Attendance(Protocol):
    """A grid that knows which nodes are connected; Flower's own do not say."""

    def has_given_up(self, nodes: Collection[int]) -> bool:
        """Whether these, of whom alone there is no answer, have all been away for too long to wait for."""
        ...

    def is_gone(self, node: int) -> bool:
        """Whether this one has been away for too long to keep a place for."""
        ...


class MessageExchange:
    """One message for each of some nodes, pushed as they are made: a grid may start on the first at once.

    A reply's node tells which message it answers, since only Flower's own grids number messages.

    Args:
        timeout_s: how long replies are waited for; None: as long as it takes.
        enough: whether those that are away may be left out; None: they are waited for as all others.

    Attributes:
        left_out: whether the exchange has ended without those that are away.
    """

    def __init__(
        self,
        grid: Grid,
        messages: Iterable[Message],
        *,
        timeout_s: float | None,
        enough: Callable[[], bool] | None = None,
    ) -> None:
        self._grid, self._enough, self.left_out = grid, enough, False
        nodes: list[int] = []

        def pushed() -> Iterator[Message]:
            for message in messages:
                nodes.append(message.metadata.dst_node_id)
                yield message

        ids = list(grid.push_messages(pushed()))
        self._waiting = dict(zip(nodes, ids, strict=True))
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s

    def replies(self) -> Iterator[Message]:
        """Each reply as soon as the grid has it, until all have answered or the time is over.

        It is over, too, when all who are connected have answered and that is enough.
        """
        pause = FIRST_PAUSE_S
        while self._waiting and (self._deadline is None or time.monotonic() < self._deadline):
            self.left_out = self._may_leave_out()
            if self.left_out:
                return
            asked, came = time.monotonic(), False
            for reply in self._grid.pull_messages(list(self._waiting.values())):
                if self._waiting.pop(reply.metadata.src_node_id, None) is not None:
                    came = True
                    yield reply
            if came:
                pause = FIRST_PAUSE_S
            elif time.monotonic() - asked < WAITING_S:  # a grid that waits by itself needs no pause
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)

    def _may_leave_out(self) -> bool:
        if self._enough is None or not isinstance(self._grid, Attendance):
            return False
        return self._grid.has_given_up(list(self._waiting)) and self._enough()

    def release(self) -> None:
        """Take back what has no answer, where the grid can: who is at work on it may stop."""
        if self._waiting and isinstance(self._grid, Cancels):
            self._grid.cancel(list(self._waiting.values()))
        self._waiting = {}


def exchange(grid: Grid, messages: Iterable[Message], *, timeout_s: float | None) -> Iterator[Message]:
    """Push `messages`, at most one per node, and yield each reply as soon as the grid has it."""
    return MessageExchange(grid, messages, timeout_s=timeout_s).replies()
