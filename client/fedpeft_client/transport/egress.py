"""What leaves the device: a file of the owner's with one line for each message, written before it is sent.

A line says what kind of message it was, its bytes, and every name and number in it; an array is told by its
size alone. It holds what was about to be sent: after a cut connection the server may have got less, never
more. Bytes are those of the messages themselves. What gRPC and TLS add, and the agent's name, which goes
along with each call beside the session, are not counted.

A file that has grown to `MOST_BYTES` is put aside, under a number, and a new one begins with a line that
holds the digest of the one before and the sums over all before. Of those put aside the newest are kept: so
the ledger is bounded, its sums are over everything, and one that was changed or taken out is found.

Messages without anything of the owner's in them, heartbeats and pieces of a blob that was announced, are
counted and written as one line when something else is sent, or when the session ends.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from fedpeft.errors import StateError, UpdateError
from fedpeft.runtime.files import storage, sync_folder
from fedpeft.v1 import federation_pb2 as pb
from fedpeft.v1 import update_pb2
from fedpeft.wire.content import decode_content
from fedpeft.wire.fields import MalformedError, length_delimited, number_of

EGRESS_FILE = "egress.jsonl"
MOST_BYTES, KEPT_FILES = 16 << 20, 16  # of one file; of those put aside
COUNTS = ("examples", "steps")  # metrics that count rows, or follow from how many there are
BEFORE = "before"  # the kind of the line that a file begins with where others were before it
Facts = Mapping[str, Any]
Outgoing = pb.AgentMessage | pb.BlobUpload | pb.PullBlobRequest | pb.EnrollRequest
_HEADER = number_of(update_pb2.Update, "header")


@dataclass
class EgressSums:
    """Messages and bytes by kind, and how often each name was told."""

    messages: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    names: Counter[str] = field(default_factory=Counter)

    def add(self, entry: Facts) -> None:
        """Count one line of the ledger; a line of sums counts for all that it sums."""
        if entry.get("what") == BEFORE:
            for counter, key in ((self.messages, "messages"), (self.bytes, "bytes"), (self.names, "names")):
                counter.update({str(name): int(count) for name, count in dict(entry[key]).items()})
            return
        what = str(entry.get("what", ""))
        self.messages[what] += int(entry.get("messages", 1))
        self.bytes[what] += int(entry.get("bytes", 0))
        self.names.update(_names_told(entry))


def _names_told(entry: Facts) -> Iterator[str]:
    """What a message told by name."""
    metrics, values = entry.get("metrics") or {}, entry.get("values") or {}
    for name in metrics:
        yield f"{'count' if name in COUNTS else 'metric'} {json.dumps(name)[1:-1]}"
    if entry.get("weight") is not None:
        yield "count weight"
    for name in values:
        yield f"value {json.dumps(name)[1:-1]}"
    for name in entry.get("capabilities") or {}:
        yield f"capability {json.dumps(name)[1:-1]}"


class EgressLedger:
    """The file; only ever appended to.

    Args:
        most_bytes: from which on it is put aside, and another one begun.

    Raises:
        StorageError: it cannot be written; then nothing leaves.
    """

    def __init__(self, path: Path, most_bytes: int = MOST_BYTES) -> None:
        self._path, self._most_bytes = path, most_bytes
        self._file = self._open()
        self._messages: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()

    def record(self, message: Outgoing, facts: Facts | None = None) -> None:
        """Write down one message, before it is sent.

        Args:
            facts: what the message doesn't say of itself; see `contents`.
        """
        what = _kind(message)
        if what in ("heartbeat", "piece"):
            self._messages[what] += 1
            self._bytes[what] += message.ByteSize()
            return
        self.settle()
        self._append(
            {"what": what, "bytes": message.ByteSize(), **_facts(what, message), **(facts or {})},
            durably=what not in ("received", "pull"),
        )

    def settle(self) -> None:
        """Write down what was only counted so far."""
        for what, count in sorted(self._messages.items()):
            self._append({"what": what, "messages": count, "bytes": self._bytes[what]}, durably=False)
        self._messages.clear()
        self._bytes.clear()

    def close(self) -> None:
        """Settle, and close the file."""
        self.settle()
        with storage(self._path):
            os.fsync(self._file)
        os.close(self._file)

    def _append(self, entry: Facts, *, durably: bool) -> None:
        with storage(self._path):
            if os.fstat(self._file).st_size >= self._most_bytes:
                self._put_aside()
            _write(self._file, entry)
            if durably:
                os.fsync(self._file)

    def _open(self) -> int:
        """Open the file; one that is new says what was before it."""
        with storage(self._path):
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":  # a crash cut the last line
                os.write(file, b"\n")
            aside = files_aside(self._path.parent)
            if not size and aside:
                _write(file, _line_before(aside[-1]))
                os.fsync(file)
        return file

    def _put_aside(self) -> None:
        folder = self._path.parent
        aside = files_aside(folder)
        number = 1 + (_number_of(aside[-1]) if aside else 0)
        os.fsync(self._file)
        os.replace(self._path, folder / f"egress-{number:06d}.jsonl")
        sync_folder(folder)
        os.close(self._file)
        self._file = self._open()
        for old in files_aside(folder)[:-KEPT_FILES]:  # their sums are in the files that are kept
            old.unlink(missing_ok=True)


def read_ledger(home: Path) -> Iterator[dict[str, Any]]:
    """The lines of an agent's files, oldest first; one that a crash cut is left out.

    Where files were dropped for their age, the first line is that of their sums; see `EgressSums`.

    Raises:
        StateError: no agent with that folder has sent anything, or a file that was put aside is missing or
            was changed.
    """
    path = home / EGRESS_FILE
    if not path.is_file():
        raise StateError(f"{home}: no agent has run with this folder; give --home or --name as at its start")
    last = ""  # digest of the file before
    for number, file in enumerate([*files_aside(home), path]):
        for entry in _entries(file):
            if entry.get("what") != BEFORE:
                yield entry
            elif number == 0:
                yield entry  # what it sums is not here any more
            elif entry.get("sha256") != last:
                raise StateError(
                    f"{file} goes on from {entry.get('file')}, which is missing or was changed; restore it"
                    " from a copy: what left this device in between is not known without it"
                )
        last = _digest_of(file) if file != path else ""


def files_aside(home: Path) -> list[Path]:
    """Return the files that were put aside, oldest first."""
    return sorted(home.glob("egress-[0-9]*.jsonl"), key=_number_of)


def _number_of(file: Path) -> int:
    number = file.stem.partition("-")[2]
    return int(number) if number.isdecimal() else 0


def _line_before(file: Path) -> Facts:
    """Return what a file that follows this one begins with."""
    sums = EgressSums()
    for entry in _entries(file):
        sums.add(entry)
    told = {"messages": dict(sums.messages), "bytes": dict(sums.bytes), "names": dict(sums.names)}
    return {"what": BEFORE, "file": file.name, "sha256": _digest_of(file), **told}


def _digest_of(file: Path) -> str:
    with storage(file), file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _entries(file: Path) -> Iterator[dict[str, Any]]:
    with storage(file), file.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict):
                yield entry


def _write(file: int, entry: Facts) -> None:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    line = (json.dumps({"time": now, **entry}) + "\n").encode()
    if os.write(file, line) != len(line):
        raise OSError(28, "the line was cut")


def contents(body: bytes) -> dict[str, Any]:
    """Every name and number in a result's body; of bytes, how many there are.

    Returns:
        `values` by "<record>.<name>"; where there is an update, also what its header says: `metrics` by name,
        `weight` (None: it says none), and its other fields in `header`.
    """
    try:
        records = decode_content(body, who="a result")
    except UpdateError:
        return {"values": {"": {"bytes": len(body)}}}
    values = {
        f"{record}.{name}": value for record, entries in records.items() for name, value in entries.items()
    }
    shown = {name: {"bytes": len(v)} if isinstance(v, bytes) else v for name, v in values.items()}
    payload = values.get("update.payload")
    header = _header_of(payload) if isinstance(payload, bytes) else None
    return {"values": shown} | ({} if header is None else _header_facts(header))


def _header_of(payload: bytes) -> update_pb2.Header | None:
    try:
        for field in length_delimited(payload, 0, len(payload)):
            if field.number == _HEADER:
                return update_pb2.Header.FromString(payload[field.content : field.end])
    except (MalformedError, DecodeError):
        return None
    return None


def _header_facts(header: update_pb2.Header) -> dict[str, Any]:
    fields = {
        "run_digest": header.run_digest.hex(),
        "round": header.round,
        "client": header.client,
        "state_digest": header.state_digest.hex(),
        "space": header.space,
        "base_digest": header.base_digest.hex(),
        "stages": {stage.kind: stage.parameters for stage in header.stages},
    }
    weight = header.weight if header.HasField("weight") else None
    return {"metrics": dict(sorted(header.metrics.items())), "weight": weight, "header": fields}


def _kind(message: Outgoing) -> str:
    if isinstance(message, pb.AgentMessage):
        return str(message.WhichOneof("message"))
    if isinstance(message, pb.BlobUpload):
        return "blob" if message.WhichOneof("message") == "open" else "piece"
    return "pull" if isinstance(message, pb.PullBlobRequest) else "enrol"


def _hello(message: Any) -> dict[str, Any]:
    hello = message.hello
    return {"name": hello.name, "software": hello.software, "capabilities": dict(hello.capabilities)}


def _result(message: Any) -> dict[str, Any]:
    result = message.result
    facts: dict[str, Any] = {"task": result.task.hex(), "signature": len(result.signature)}
    if result.HasField("failure"):
        facts["failure"] = pb.FailureCode.Name(result.failure.code)
    return facts


def _refusal(message: Any) -> dict[str, Any]:
    told = {
        pb.PolicyKey.Name(objection.key): objection.limit if objection.HasField("limit") else None
        for objection in message.refusal.objections
    }
    return {"task": message.refusal.task.hex(), "refusal": told}


def _facts(what: str, message: Any) -> dict[str, Any]:
    """What a message says of itself."""
    return _FACTS[what](message)


_FACTS: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "hello": _hello,
    "received": lambda message: {"task": message.received.task.hex()},
    "result": _result,
    "refusal": _refusal,
    "blob": lambda message: {"task": message.open.task.hex(), "size": message.open.size},
    "pull": lambda message: {"task": message.task.hex()},
    "enrol": lambda message: {"csr": len(message.csr), "token": bool(message.token)},
}
