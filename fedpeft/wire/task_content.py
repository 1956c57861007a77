"""The record of a task's content: one round's work for one client, checked for types as it is read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from fedpeft.errors import UpdateError
from fedpeft.wire.content import Value, decode_content

RECORD = "task"
START = "start"  # entry of a task's record
_MOST_ROUNDS = 2**32
Kind = TypeVar("Kind", int, float, str, bytes)


@dataclass(frozen=True)
class Task:
    """One round's work for one client.

    Attributes:
        run_digest: which run: of its device task for agents, of its run file elsewhere.
        state: the global state as `fedpeft.wire` bytes.
        run_json: the run, for processes of engines that load it by themselves; else empty.
        device_task: what agents are told of the run (`fedpeft.config.device_task`); else empty.
        proximal_mu: FedProx's pull towards the state.
        start: at roll call, what spares the receiver to compute the model's start; see
            `fedpeft.participant.loaded_run.LoadedRun.start_bytes`.
    """

    run_digest: str
    round: int
    state: bytes
    run_json: str = ""
    proximal_mu: float = 0.0
    start: bytes = b""
    device_task: str = ""


def task_record(task: Task) -> dict[str, Value]:
    """The task as a record's entries."""
    entries: dict[str, Value] = {
        "run-digest": task.run_digest,
        "round": task.round,
        "proximal-mu": task.proximal_mu,
        "state": task.state,
    }
    optional: dict[str, Value] = {"run": task.run_json, "device-task": task.device_task, START: task.start}
    return entries | {name: value for name, value in optional.items() if value}


def task_of_record(entries: Mapping[str, object]) -> Task:
    """Inverse of `task_record`, for a record that came from outside.

    Raises:
        UpdateError: an entry is missing, of another type, or out of its bounds.
    """
    round_, pull = _entry(entries, "round", int), _entry(entries, "proximal-mu", float)
    if not 0 <= round_ < _MOST_ROUNDS:
        raise UpdateError(f"a task of round {round_} came; rounds count from 0")
    if not (math.isfinite(pull) and pull >= 0.0):
        raise UpdateError(f"a task with proximal-mu {pull} came; it is a finite number from 0")
    return Task(
        run_digest=_entry(entries, "run-digest", str),
        round=round_,
        state=_entry(entries, "state", bytes),
        run_json=_entry(entries, "run", str, ""),
        proximal_mu=pull,
        start=_entry(entries, START, bytes, b""),
        device_task=_entry(entries, "device-task", str, ""),
    )


def read_task_content(content: bytes | memoryview) -> Task:
    """The task in a content's bytes.

    Raises:
        UpdateError: they are no content, or it holds no sound task.
    """
    records = decode_content(content, who="the server")
    if RECORD not in records:
        raise UpdateError(
            "a message without a task came; server and agent must run the same version of fedpeft"
        )
    return task_of_record(records[RECORD])


def is_digest(text: str) -> bool:
    """Whether a text is a SHA-256 in hexadecimal, and so may be part of a file's name."""
    return re.fullmatch(r"[0-9a-f]{64}", text) is not None


def _entry(entries: Mapping[str, object], name: str, kind: type[Kind], absent: Kind | None = None) -> Kind:
    value = entries.get(name, absent)
    if not isinstance(value, kind) or isinstance(value, bool):
        came = "none" if value is None else type(value).__name__
        raise UpdateError(f"a task whose '{name}' is {came} came; {kind.__name__} is needed")
    return value
