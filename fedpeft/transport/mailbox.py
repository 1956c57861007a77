"""Messages to clients that are at work for as long as they take, and their replies in any order."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from flwr.app import Message
from flwr.serverapp import Grid

from fedpeft.transport.message_exchange import FIRST_PAUSE_S, LONGEST_PAUSE_S, WAITING_S, Cancels

_FIRST_LOOK_S, _LONGEST_LOOK_S = 0.1, 5.0  # between two looks whether somebody who is waited for has left


class Mailbox:
    """One message per client at a time.

    Args:
        timeout_s: how long each client has, in real seconds; None: as long as it takes.
    """

    def __init__(self, grid: Grid, timeout_s: float | None) -> None:
        self._grid = grid
        self._patience_s = math.inf if timeout_s is None else timeout_s
        self._ids: dict[str, str] = {}  # of those without a reply, by client
        self._names: dict[int, str] = {}  # clients by node
        self._until: dict[str, float] = {}
        self._came: dict[str, Message] = {}  # taken from the grid before their turn
        self._coming: Iterator[Message] = iter(())

    def send(self, messages: Mapping[str, Message]) -> None:
        """Push, by client."""
        ids = list(self._grid.push_messages(list(messages.values()))) if messages else []
        for (client, message), id_ in zip(messages.items(), ids, strict=True):
            self._ids[client] = id_
            self._names[message.metadata.dst_node_id] = client
            self._until[client] = time.monotonic() + self._patience_s

    def of(self, client: str) -> Message | None:
        """This client's reply, whoever else's come before it; None: not in time."""
        while client not in self._came:
            if not self._more(self._until[client]):
                return None
        return self._came.pop(client)

    def first(
        self, gone: Callable[[Collection[str]], str | None] = lambda awaited: None
    ) -> tuple[str, Message | None] | None:
        """The reply that came first, or a client whose time is over with None; None: nobody is asked.

        Args:
            gone: given those who are waited for, says whose time is over since it left; None: nobody's.
        """
        if not self._came and not self._ids:
            return None
        look_s = _FIRST_LOOK_S  # only after a pull: who has left may have answered before
        while not self._came:
            hurried = min(self._ids, key=lambda client: self._until[client])
            now = time.monotonic()
            left = hurried if now >= self._until[hurried] else None
            if not self._more(now if left else min(self._until[hurried], now + look_s)):
                left = left or gone(self._ids.keys())
                if left is not None:
                    return left, None
                look_s = min(2 * look_s, _LONGEST_LOOK_S)
        client = next(iter(self._came))
        return client, self._came.pop(client)

    def withdraw(self, clients: Iterable[str]) -> None:
        """Nobody waits for these any more."""
        for reply in self._coming:  # else an old reply could be taken for that to a later message
            self._keep(reply)
        gone = set(clients)
        ids = [self._ids.pop(client) for client in sorted(gone & self._ids.keys())]
        self._came = {client: reply for client, reply in self._came.items() if client not in gone}
        if ids and isinstance(self._grid, Cancels):
            self._grid.cancel(ids)

    def close(self) -> None:
        """Withdraw what is left."""
        self.withdraw({*self._ids, *self._came})

    def _keep(self, reply: Message) -> str | None:
        """Put a reply by until its turn; whose it is, None if it was withdrawn meanwhile."""
        sender = self._names.get(reply.metadata.src_node_id, "")
        if self._ids.pop(sender, None) is None:
            return None
        self._came[sender] = reply
        return sender

    def _more(self, until: float) -> bool:
        """Wait for one more reply of anybody's, until then by the monotonic clock; whether one came."""
        pause, pulled = FIRST_PAUSE_S, time.monotonic() - WAITING_S
        while True:
            for reply in self._coming:
                if self._keep(reply) is not None:
                    return True
            now = time.monotonic()
            if now >= until:
                return False
            if now - pulled < WAITING_S:  # a grid that waits by itself needs no pause
                time.sleep(min(pause, until - now))
                pause = min(2 * pause, LONGEST_PAUSE_S)
            pulled = time.monotonic()
            self._coming = iter(self._grid.pull_messages(list(self._ids.values())))
