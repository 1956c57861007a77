"""What our grids have in common: the round loop pushes and pulls, and asks nothing else of one."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedpeft.transport.message_exchange import Cancels


class PolledGrid(Grid):
    """Flower's `Grid` from `get_node_ids`, `push_messages` and `pull_messages`; the rest of it is here."""

    def set_run(self, run: Any) -> None:
        """Flower's runtimes call this; there is nothing to set here."""

    @property
    def run(self) -> Any:
        """There is no Flower run behind this grid."""
        raise NotImplementedError(f"{type(self).__name__} is not bound to a Flower run")

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message to one node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Replies, in any order; after `timeout` seconds what is late is cancelled, where a grid can."""
        ids = list(self.push_messages(messages))
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while len(replies) < len(ids) and (deadline is None or time.monotonic() < deadline):
            replies.extend(self.pull_messages(ids))
        if isinstance(self, Cancels):
            self.cancel(ids)
        return replies
