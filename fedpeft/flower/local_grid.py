"""Our in-process `Grid`: clients run in this process or in workers forked from it, sharing one base model."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flwr.app import Error, Message, RecordDict, UserConfig
from numpy.typing import NDArray

from fedpeft.flower.execute import Call, load_app
from fedpeft.transport.client_state_arrays import MEMORY, arrays_in, record_of
from fedpeft.transport.node_identity import ensure_identity
from fedpeft.transport.polled_grid import PolledGrid
from fedpeft.transport.tasks import ERROR_CODE
from fedpeft.workers import AHEAD, Job, Shared, Workers

CLIENT_APP = "fedpeft.flower.client_app:app"


class LocalGrid(PolledGrid):
    """Nodes 1 to N stand for clients 0 to N - 1.

    Messages wait in a queue; `pull_messages` keeps a few in flight for each worker, so that none idles, and
    blocks until at least one reply is there. So memory holds replies in flight, never a whole cohort. One
    content object that several messages share is sent to each worker once.

    Args:
        clients: N.
        workers: where client functions run.
        client_app: ``module:attribute`` of a `ClientApp`; a name, since workers look it up themselves.
    """

    def __init__(self, clients: int, workers: Workers, client_app: str = CLIENT_APP) -> None:
        ensure_identity()
        self._clients = clients
        self._workers = workers
        self._app = client_app
        self._queue: deque[tuple[str, Message]] = deque()
        self._running: dict[Job[Any], tuple[str, Message]] = {}
        self._shared: tuple[RecordDict, Shared] | None = None
        self._count = 0
        self.states: dict[int, RecordDict] = {}  # what clients remember between rounds, by node

    def get_node_ids(self) -> Iterable[int]:
        """1 to N."""
        return range(1, self._clients + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages, the first of them for processes that idle; returns their ids."""
        ids = []
        for message in messages:
            self._count += 1
            ids.append(str(self._count))
            self._queue.append((ids[-1], message))
            if self._workers.width > 1:
                self._fill()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that are ready, in any order; blocks for the first. Empty when nothing is under way."""
        wanted = set(message_ids)
        self._fill()
        if not self._running:
            return []
        replies = []
        for job in self._workers.wait(self._running):
            message_id, message = self._running.pop(job)
            reply = self._reply(job, message)
            if message_id in wanted:
                replies.append(reply)
        if self._workers.width > 1:  # keep the processes busy while the caller folds
            self._fill()
        return replies

    def cancel(self, message_ids: Iterable[str]) -> None:
        """Forget messages that have not been started (late ones, whose round is over)."""
        unwanted = set(message_ids)
        self._queue = deque(entry for entry in self._queue if entry[0] not in unwanted)

    def memory(self) -> dict[str, NDArray[Any]]:
        """What clients remember, as ``"<node>/<array>"`` to array."""
        return {
            f"{node}/{name}": array
            for node, state in sorted(self.states.items())
            for name, array in arrays_in(state, MEMORY).items()
        }

    def restore_memory(self, memory: Mapping[str, NDArray[Any]]) -> None:
        """Inverse of `memory`; clients that it doesn't name remember nothing."""
        by_node: dict[int, dict[str, NDArray[Any]]] = {}
        for key, array in memory.items():
            node, _, name = key.partition("/")
            by_node.setdefault(int(node), {})[name] = array
        self.states = {node: RecordDict({MEMORY: record_of(arrays)}) for node, arrays in by_node.items()}

    def _fill(self) -> None:
        while self._queue and len(self._running) < AHEAD * self._workers.width:
            message_id, message = self._queue.popleft()
            node = message.metadata.dst_node_id
            job = self._workers.submit(
                _execute,
                self._app,
                (node, self._clients, message.metadata.message_type, message.metadata.group_id),
                self._share(message.content),
                self.states.get(node),
            )
            self._running[job] = (message_id, message)
            if job.done:  # an inline worker: hand the reply over before the next client starts
                return

    def _share(self, content: RecordDict) -> Shared:
        if self._shared is None or self._shared[0] is not content:
            self._shared = (content, self._workers.share(content))
        return self._shared[1]

    def _reply(self, job: Job[Any], message: Message) -> Message:
        content, state = job.result()
        if state is not None:
            self.states[message.metadata.dst_node_id] = state
        if isinstance(content, str):
            return Message(Error(code=ERROR_CODE, reason=content), reply_to=message)
        return Message(content, reply_to=message)


def _execute(
    app: str, address: Sequence[Any], content: Shared, state: RecordDict | None
) -> tuple[RecordDict | str, RecordDict | None]:
    """Run one client function; its reply's content (an error as text) and the client's state, if any."""
    node, clients, message_type, group = address
    config: UserConfig = {"partition-id": node - 1, "num-partitions": clients}
    remembered = RecordDict() if state is None else state
    reply = Call(content.get(), message_type, group, node, config).answer(load_app(app), remembered)
    kept = None if isinstance(reply, str) or not len(remembered) else remembered
    return reply, kept
