"""The one place that touches Flower beyond its public packages.

`flwr.app.Message` stamps every new message with process-wide identity, which only Flower's own runtimes set.
A grid of ours must set it too, before the first message is made. The values mean nothing to us: messages are
routed by grid, node id and group id, since several runs in one process would overwrite each other's.
"""

from __future__ import annotations

from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE_ID = 1  # as Flower's own in-process grids number the server


def ensure_identity() -> None:
    """Give this process an identity unless Flower's runtime has already given it one."""
    try:
        _ = TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id
    except RuntimeError:
        TaskIdentity.run_id = 1
        TaskIdentity.node_id = SERVER_NODE_ID
        TaskIdentity.task_id = 1
