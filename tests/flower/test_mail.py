"""Replies by client, in any order, within each client's time, and never those to older messages."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from flwr.app import ConfigRecord, Message, RecordDict

from fedpeft.transport.mailbox import Mailbox
from fedpeft.transport.message_exchange import Cancels
from fedpeft.transport.node_identity import ensure_identity
from fedpeft.transport.polled_grid import PolledGrid
from fedpeft.transport.tasks import TRAIN

NODES = {"ann": 1, "bob": 2, "eve": 3}


class Scripted(PolledGrid):
    """Answers in the order of a script, a batch at each pull."""

    def __init__(self, *batches: str) -> None:
        self.batches = deque(batches)
        self.sent: dict[str, Message] = {}
        self.cancelled: list[str] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            ids.append(f"{len(self.sent)}")
            self.sent[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        names = self.batches.popleft().split() if self.batches else []
        latest = {message.metadata.dst_node_id: message for message in self.sent.values()}
        wanted = {self.sent[id_].metadata.dst_node_id for id_ in message_ids}
        return [reply(latest[NODES[name]]) for name in names if NODES[name] in wanted]

    def cancel(self, message_ids: Iterable[str]) -> None:
        self.cancelled.extend(message_ids)

    def get_node_ids(self) -> Iterable[int]:
        return NODES.values()


def task(name: str, text: str) -> Message:
    ensure_identity()
    return Message(RecordDict({"t": ConfigRecord({"text": text})}), NODES[name], TRAIN, group_id="1")


def reply(message: Message) -> Message:
    return Message(message.content, reply_to=message)


def text(came: Message | None) -> str:
    assert came is not None
    return str(came.content.config_records["t"]["text"])


def asked(mail: Mailbox, *names: str, text: str = "first") -> None:
    mail.send({name: task(name, f"{name} {text}") for name in names})


def test_one_is_waited_for_and_the_others_are_kept_in_their_order() -> None:
    mail = Mailbox(Scripted("eve", "", "bob ann"), None)
    assert mail.first() is None
    asked(mail, *NODES)
    assert text(mail.of("ann")) == "ann first"
    for name in ("eve", "bob"):
        came = mail.first()
        assert came is not None
        assert (came[0], text(came[1])) == (name, f"{name} first")
    assert mail.first() is None


def test_a_client_has_so_much_time_and_no_more() -> None:
    grid = Scripted("bob")
    mail = Mailbox(grid, 0.05)
    asked(mail, "ann", "bob")
    assert mail.first() is not None
    assert mail.of("ann") is None
    assert mail.first() == ("ann", None)
    mail.withdraw(["ann"])
    assert grid.cancelled == ["0"]
    assert mail.first() is None


def test_a_reply_to_a_message_that_was_withdrawn_is_not_taken_for_the_next() -> None:
    grid = Scripted("ann bob", "bob")
    assert isinstance(grid, Cancels)
    mail = Mailbox(grid, None)
    asked(mail, "ann", "bob")
    assert text(mail.of("ann")) == "ann first"  # bob's reply is here too, unread
    mail.withdraw(["bob"])
    asked(mail, "bob", text="second")
    assert text(mail.of("bob")) == "bob second"
    assert grid.cancelled == []


def test_closing_takes_everything_back() -> None:
    grid = Scripted("ann")
    mail = Mailbox(grid, None)
    asked(mail, *NODES)
    mail.of("ann")
    mail.close()
    assert sorted(grid.cancelled) == ["1", "2"]
    assert mail.first() is None
