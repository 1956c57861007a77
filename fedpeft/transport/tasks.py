"""What a task and its reply hold: typed records on one side, Flower's `RecordDict` on the other."""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import ConfigRecord, ConfigRecordValues, Error, Message, RecordDict

from fedpeft.errors import FederationError, FedPEFTError
from fedpeft.wire.failures import from_text, to_text
from fedpeft.wire.task_content import RECORD, Task, task_of_record, task_record
from fedpeft.wire.task_kinds import HELLO, TRAIN

__all__ = [
    "ERROR_CODE",
    "HELLO",
    "TRAIN",
    "Hello",
    "Task",
    "client_error",
    "error_reply",
    "hello_reply",
    "read_hello",
    "read_task",
    "read_update",
    "task_content",
    "update_reply",
]

ERROR_CODE = 1000  # ours, beyond the codes that Flower's runtimes use


@dataclass(frozen=True)
class Hello:
    """What a client says of itself at roll call; `plugins` is as `plugins_text` makes it."""

    client: str
    examples: int
    base_digest: str
    plugins: str = ""


def task_content(task: Task) -> RecordDict:
    """A task as message content; one content object serves all clients of a round."""
    entries: dict[str, ConfigRecordValues] = {**task_record(task)}
    return RecordDict({RECORD: ConfigRecord(entries)})


def read_task(message: Message) -> Task:
    """Inverse of `task_content`.

    Raises:
        FederationError: the message holds no task.
        UpdateError: it holds one that is not sound.
    """
    record = _record(message, RECORD)
    if record is None:
        raise FederationError(
            "a message without a task came; server and client must run the same version of fedpeft"
        )
    return task_of_record(record)


def update_reply(payload: bytes, message: Message) -> Message:
    """A finished task's reply."""
    return Message(RecordDict({"update": ConfigRecord({"payload": payload})}), reply_to=message)


def read_update(reply: Message) -> bytes:
    """The update's bytes.

    Raises:
        FedPEFTError: what went wrong at the client, as the error class it was there.
        FederationError: the reply holds no update.
    """
    if reply.has_error():
        raise client_error(reply.error)
    record = _record(reply, "update")
    payload = None if record is None else record.get("payload")
    if not isinstance(payload, bytes):
        raise FederationError(
            "a reply without an update came; server and client must run the same version of fedpeft"
        )
    return payload


def hello_reply(hello: Hello, message: Message) -> Message:
    """A roll call's reply."""
    config: dict[str, ConfigRecordValues] = {
        "client": hello.client,
        "examples": hello.examples,
        "base-digest": hello.base_digest,
    }
    if hello.plugins:
        config["plugins"] = hello.plugins
    return Message(RecordDict({"hello": ConfigRecord(config)}), reply_to=message)


def read_hello(reply: Message) -> Hello:
    """Inverse of `hello_reply`; raises as `read_update` does."""
    if reply.has_error():
        raise client_error(reply.error)
    record = _record(reply, "hello")
    if record is None:
        raise FederationError(
            "a reply without a greeting came; server and client must run the same version of fedpeft"
        )
    return Hello(
        str(record["client"]),
        int(record["examples"]),  # type: ignore[arg-type]
        str(record["base-digest"]),
        str(record.get("plugins", "")),
    )


def _record(message: Message, name: str) -> ConfigRecord | None:
    """A content's record; its `config_records` would tie it into a cycle and keep it until collected."""
    record = message.content.get(name)
    return record if isinstance(record, ConfigRecord) else None


def error_reply(error: Exception, message: Message) -> Message:
    """A failed task's reply: the class by name, so that the server can raise the same one.

    The text is the error's own: what leaves a device goes through `fedpeft.wire.failures.without_text` first.
    """
    return Message(Error(code=ERROR_CODE, reason=to_text(error)), reply_to=message)


def client_error(error: Error) -> FedPEFTError:
    """The error a client replied with; what is not ours becomes a `FederationError`."""
    reason = error.reason or f"Flower error code {error.code}"
    known = from_text(reason) if error.code == ERROR_CODE else None
    return known or FederationError(reason.splitlines()[0])
