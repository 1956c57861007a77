"""Messages out, replies in as they come, on any grid."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.01, 1.0
WAITING_S = 0.1  # a pull that came back empty after so long has waited


def exchange(grid: Grid, messages: Sequence[Message], *, timeout_s: float | None) -> Iterator[Message]:
    """Push `messages` and yield each reply as soon as the grid has it.

    At most one message per node. A reply's node tells which message it answers, since only Flower's own grids
    number messages. Ends when all have answered or the time is over.
    """
    ids = list(grid.push_messages(messages))
    waiting = {message.metadata.dst_node_id: id_ for message, id_ in zip(messages, ids, strict=True)}
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    pause = FIRST_PAUSE_S
    while waiting and (deadline is None or time.monotonic() < deadline):
        asked, came = time.monotonic(), False
        for reply in grid.pull_messages(list(waiting.values())):
            if waiting.pop(reply.metadata.src_node_id, None) is not None:
                came = True
                yield reply
        if came:
            pause = FIRST_PAUSE_S
        elif time.monotonic() - asked < WAITING_S:  # a grid that waits by itself needs no pause
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
