"""A daemon's runs without a network: agents are clients in this process, behind durable acceptance."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedpeft.flower.local_grid import LocalGrid
from fedpeft.transport.polled_grid import PolledGrid
from fedpeft.transport.tasks import TRAIN, read_update, update_reply
from fedpeft.workers import InlineWorkers
from fedpeft_server.store import Store, StoredRun
from fedpeft_server.store.contracts import ReceivedResult

AGENTS = "fedpeft.flower.in_process_app:app"


class InMemoryGrid(PolledGrid):
    """As the real grid does: replies are given out once they are durable, and recalled after a restart."""

    def __init__(self, inner: LocalGrid, store: Store, stored: StoredRun) -> None:
        self._inner, self._store, self._stored = inner, store, stored
        self._recalled: dict[str, Message] = {}
        self.worked: list[tuple[int, int]] = []  # round, node of every update that came
        self.away: set[int] = set()
        self.leaving: set[int] = set()  # away once the roll was called
        self.gone_s: dict[int, float] = {}  # by node: how long it has been away
        self.at_once = False  # all answers come in one pull: no deadline falls between two of them
        self.hold_after: int | None = None  # so many updates, no further one comes
        self.held = threading.Event()
        self.before_accept: Callable[[], object] = lambda: None

    @property
    def grid(self) -> Grid:
        return self

    @property
    def greeter(self) -> Grid:
        return self

    def here(self) -> Mapping[str, int]:
        return {}

    def away_s(self, node: int) -> tuple[str, float] | None:
        return (str(node), self.gone_s[node]) if node in self.gone_s else None

    def know(self, agents: Iterable[str]) -> None: ...

    def tell(self, agent: str, text: str) -> None: ...

    def set_result_limit(self, result_bytes: int) -> None: ...

    def count_refusal(self, agent: str, why: str) -> None: ...

    def get_node_ids(self) -> Iterable[int]:
        return [node for node in self._inner.get_node_ids() if node not in self.away]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids, asked = [], list(messages)
        if any(message.metadata.message_type == TRAIN for message in asked):
            self.away |= self.leaving
        away = frozenset(self.away)  # all are asked in the same moment
        for message in asked:
            meta = message.metadata
            kept = {
                arrival.agent: arrival
                for arrival in self._store.results.recall(
                    self._stored.id, int(meta.group_id), meta.message_type
                )
            }.get(str(meta.dst_node_id))
            if kept is not None:
                body = kept.body if kept.body is not None else self._store.blobs.get(kept.digest)
                ids.append(f"recalled-{meta.group_id}-{meta.dst_node_id}")
                self._recalled[ids[-1]] = update_reply(body, message)
            elif meta.dst_node_id in away:
                ids.append(f"away-{meta.group_id}-{meta.dst_node_id}")
            else:
                ids.extend(self._inner.push_messages([message]))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = list(message_ids)
        replies = [self._recalled.pop(id_) for id_ in wanted if id_ in self._recalled]
        if replies:
            return replies
        if self.hold_after is not None and len(self.worked) >= self.hold_after:
            self.held.set()
            return []
        replies = [self._durable(reply) for reply in self._inner.pull_messages(wanted)]
        while self.at_once and (more := list(self._inner.pull_messages(wanted))):
            replies += [self._durable(reply) for reply in more]
        return replies

    def _durable(self, reply: Message) -> Message:
        meta = reply.metadata
        if reply.has_error() or meta.message_type != TRAIN:
            return reply
        self.before_accept()
        payload = read_update(reply)
        came = arrival(self._stored, meta, payload)
        if meta.src_node_id % 2:  # half of them as the large ones come: in pieces, then by reference
            if not self._store.blobs.has(came.digest):
                self._upload(came.digest, payload)
            came = replace(came, body=None)
        assert self._store.results.accept([came]) == [None]
        self.worked.append((int(meta.group_id), meta.src_node_id))
        return reply

    def _upload(self, digest: str, payload: bytes) -> None:
        partial = self._store.blobs.begin(digest, len(payload))
        while partial.offset < len(payload):
            partial.write(payload[partial.offset : partial.offset + 10_000])
        partial.finish()


def arrival(stored: StoredRun, meta: Any, payload: bytes) -> ReceivedResult:
    return ReceivedResult(
        run=stored.id,
        run_digest=stored.digest,
        round=int(meta.group_id),
        kind=TRAIN,
        agent=str(meta.src_node_id),
        task=b"t" * 16,
        digest=hashlib.sha256(payload).hexdigest(),
        size=len(payload),
        body=payload,
        signature=b"s" * 64,
    )


def standins(
    store: Store, made: list[InMemoryGrid], clients: int = 4, hold_after: int | None = None
) -> Callable[[StoredRun], AbstractContextManager[InMemoryGrid]]:
    """Opens stand-ins, which begin with that `hold_after`, and keeps them in `made`."""

    @contextmanager
    def open_grid(stored: StoredRun) -> Iterator[InMemoryGrid]:
        made.append(InMemoryGrid(LocalGrid(clients, InlineWorkers(), AGENTS), store, stored))
        made[-1].hold_after = hold_after
        yield made[-1]

    return open_grid
