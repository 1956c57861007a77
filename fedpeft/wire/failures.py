"""The one codec of errors: what went wrong in one process, as another one is told of it.

There are two forms, by who reads them.

- **Text and record** stay with one owner, or say what a server says of itself: from a worker process to its
  agent, from a model process to its server, from a server to people's commands. They carry the error's own
  words.
- **A message** goes from a device to a server. It is a code of a closed list, and keys of the owner's policy:
  whatever an error's words say of rows, fields, files or settings stays in the device's log. What a server
  then shows is a sentence made here from the code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from fedpeft import errors
from fedpeft.errors import FedPEFTError, PolicyError, RunFileError, UpdateError
from fedpeft.v1 import federation_pb2 as pb

MAX_OBJECTIONS = 32

# Code to the class that a server raises, and what it says.
SENTENCES: Mapping[str, tuple[type[FedPEFTError], str]] = {
    "internal": (FedPEFTError, "it failed with an error that is not one of fedpeft's"),
    "task": (errors.FederationError, "it could not use the task or the state that came with it"),
    "run-file": (errors.FederationError, "it cannot take part in a run with this run file"),
    "data": (errors.DataError, "its rows cannot be used as the run file asks"),
    "model": (errors.ModelError, "it cannot load the model, or holds another one"),
    "memory": (errors.MemoryLimitError, "it has, or gives, too little memory for this run"),
    "time": (errors.TimeLimitError, "the task took longer than its owner allows"),
    "worker": (errors.WorkerError, "the process that worked on the task died"),
    "training": (errors.TrainingError, "its training did not come to a finite end"),
    "state": (errors.StateError, "what it keeps on its disk is corrupt or in the way"),
    "storage": (errors.StorageError, "its disk is full, or cannot be read or written"),
    "extra": (errors.MissingExtraError, "an optional package is not installed there"),
    "federation": (errors.FederationError, "it could not do the task"),
    "privacy": (errors.PrivacyError, "a privacy precondition does not hold there"),
    "credential": (errors.CredentialError, "its credentials were not accepted"),
    "rows": (errors.RowsChangedError, "its rows are not those that it answered the run's roll call with"),
    "busy": (errors.FederationError, "too many tasks wait there already"),
}


# ---- For one owner


def to_text(error: BaseException) -> str:
    """The error on one line, "<class>: <reason>"."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def from_text(text: str) -> FedPEFTError | None:
    """Inverse of `to_text`; None where the class is not one of ours."""
    name, colon, reason = text.partition(": ")
    kind = _class_named(name)
    if kind is None or not colon:
        return None
    if issubclass(kind, RunFileError):
        source, _, problem = reason.partition(": ")
        return kind(source, [problem])
    if issubclass(kind, PolicyError):
        return kind(reason, {})
    return kind(reason)


def to_record(error: Exception) -> dict[str, Any]:
    """The error with all that it holds, as plain JSON."""
    record: dict[str, Any] = {"class": type(error).__name__, "text": str(error)}
    if isinstance(error, RunFileError):
        record |= {"source": error.source, "problems": list(error.problems)}
    if isinstance(error, PolicyError):
        record["limits"] = error.limits
    return record


def from_record(record: Mapping[str, Any]) -> Exception:
    """Inverse of `to_record`; an error that is not ours becomes a `RuntimeError` that names its class."""
    kind, text = _class_named(str(record["class"])), str(record["text"])
    if kind is None:
        return RuntimeError(f"{record['class']}: {text}")
    if issubclass(kind, RunFileError):
        return kind(str(record["source"]), [str(problem) for problem in record["problems"]])
    if issubclass(kind, PolicyError):
        return kind(text, record["limits"])
    return kind(text)


def _class_named(name: str) -> type[FedPEFTError] | None:
    kind = getattr(errors, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, FedPEFTError) else None


# ---- From a device to a server


def code_of(error: BaseException) -> str:
    """All that leaves a device of an error that is no `PolicyError`; a key of `SENTENCES`."""
    code = error.code if isinstance(error, FedPEFTError) else ""
    return code if code in SENTENCES else FedPEFTError.code


def without_text(error: BaseException, who: str = "a client") -> FedPEFTError:
    """The error as whoever is told only its code shows it.

    Args:
        who: the device.
    """
    if isinstance(error, PolicyError):
        return _refusal_error(error.limits, who)
    return _of_code(code_of(error), who)


def to_failure(error: BaseException) -> pb.Failure:
    """What leaves a device of an error."""
    return pb.Failure(code=_name_of("FAILURE_CODE", code_of(error)))


def to_refusal(error: PolicyError, told: Iterable[str] = ()) -> pb.Refusal:
    """What leaves a device of a refusal; `task` is still to be set.

    Args:
        told: keys of the policy whose numbers the owner tells.
    """
    tells, refusal = frozenset(told), pb.Refusal()
    for key, limit in list(error.limits.items())[:MAX_OBJECTIONS]:
        objection = refusal.objections.add(key=_name_of("POLICY_KEY", key))
        if key in tells and limit is not None:
            objection.limit = limit
    return refusal


def from_message(message: pb.Failure | pb.Refusal, who: str) -> FedPEFTError:
    """The error that a server raises for what came from a device; its words are ours.

    Args:
        who: the device.

    Raises:
        UpdateError: a code or a key that is not in the list, a limit that is no number, or too many of them.
    """
    if isinstance(message, pb.Failure):
        code = _list_problems(pb.FailureCode, message.code, "FAILURE_CODE", who)
        return _of_code(code, who)
    if not 1 <= len(message.objections) <= MAX_OBJECTIONS:
        raise UpdateError(
            f"{who}: a refusal of {len(message.objections)} objections came; 1 to {MAX_OBJECTIONS} are taken"
        )
    limits: dict[str, float | None] = {}
    for objection in message.objections:
        key = _list_problems(pb.PolicyKey, objection.key, "POLICY_KEY", who)
        limits[key] = objection.limit if objection.HasField("limit") else None
        if not math.isfinite(limits[key] or 0.0):
            raise UpdateError(f"{who}: a refusal came whose limit for policy.{key} is not finite")
    return _refusal_error(limits, who)


def policy_keys() -> frozenset[str]:
    """The keys of a policy that a refusal can name."""
    return frozenset(_code_of(name, "POLICY_KEY", "_") for name in pb.PolicyKey.DESCRIPTOR.values_by_name) - {
        "unspecified"
    }


def _of_code(code: str, who: str) -> FedPEFTError:
    kind, sentence = SENTENCES[code]
    return kind(f"{who}: {sentence} ('{code}'); the reason is in that device's own log")


def _refusal_error(limits: Mapping[str, float | None], who: str) -> PolicyError:
    named = ", ".join(
        f"policy.{key}" + ("" if limit is None else f" ({limit:g})") for key, limit in sorted(limits.items())
    )
    return PolicyError(f"{who}: refused by the agent's policy: {named}", limits)


def _list_problems(enum: Any, number: int, prefix: str, who: str) -> str:
    if number == 0 or number not in enum.values():
        raise UpdateError(
            f"{who}: a {prefix.lower().replace('_', ' ')} came that is not in the list ({number})"
        )
    return _code_of(enum.Name(number), prefix, "_" if prefix == "POLICY_KEY" else "-")


def _name_of(prefix: str, code: str) -> str:
    return f"{prefix}_{code.replace('-', '_').upper()}"


def _code_of(name: str, prefix: str, between: str) -> str:
    return name.removeprefix(f"{prefix}_").lower().replace("_", between)
