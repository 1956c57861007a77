"""What a task and its reply hold: typed records on one side, Flower's `RecordDict` on the other."""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import ConfigRecord, ConfigRecordValues, Error, Message, RecordDict

from fedpeft.errors import FederationError, FedPEFTError
from fedpeft.wire.failures import from_text, to_text
from fedpeft.wire.task_kinds import HELLO, TRAIN

__all__ = ["HELLO", "TRAIN"]
START = "start"  # entry of a task's record
ERROR_CODE = 1000  # ours, beyond the codes that Flower's runtimes use


@dataclass(frozen=True)
class Task:
    """One round's work for one client.

    Attributes:
        run_digest: which run; the run itself is in `run_json` where the receiver may not hold it yet (else
            empty).
        state: the global state as `fedpeft.wire` bytes.
        proximal_mu: FedProx's pull towards the state.
        start: at roll call, what spares the receiver to compute the model's start; see
            `fedpeft.resident.Resident.start_bytes`.
    """

    run_digest: str
    round: int
    state: bytes
    run_json: str = ""
    proximal_mu: float = 0.0
    start: bytes = b""


@dataclass(frozen=True)
class Hello:
    """What a client says of itself at roll call."""

    client: str
    examples: int
    base_digest: str


def task_content(task: Task) -> RecordDict:
    """A task as message content; one content object serves all clients of a round."""
    config: dict[str, ConfigRecordValues] = {
        "run-digest": task.run_digest,
        "round": task.round,
        "proximal-mu": task.proximal_mu,
        "state": task.state,
    }
    if task.run_json:
        config["run"] = task.run_json
    if task.start:
        config[START] = task.start
    return RecordDict({"task": ConfigRecord(config)})


def read_task(message: Message) -> Task:
    """Inverse of `task_content`.

    Raises:
        FederationError: the message holds no task.
    """
    record = _record(message, "task")
    if record is None:
        raise FederationError(
            "a message without a task came; server and client must run the same version of fedpeft"
        )
    return Task(
        run_digest=str(record["run-digest"]),
        round=int(record["round"]),  # type: ignore[arg-type]
        state=bytes(record["state"]),  # type: ignore[arg-type]
        run_json=str(record.get("run", "")),
        proximal_mu=float(record["proximal-mu"]),  # type: ignore[arg-type]
        start=bytes(record.get(START, b"")),  # type: ignore[arg-type]
    )


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
    return Hello(str(record["client"]), int(record["examples"]), str(record["base-digest"]))  # type: ignore[arg-type]


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
