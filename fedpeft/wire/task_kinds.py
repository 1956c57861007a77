"""The kinds of task that a client can be given; `Task.kind` on the wire and a message's type in Flower."""

from __future__ import annotations

TRAIN, HELLO = "train", "query.hello"
TASK_KINDS = frozenset({TRAIN, HELLO})
