"""What a task or a result holds, as bytes: typed values by name, in named records, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.message import DecodeError

from fedpeft.errors import UpdateError
from fedpeft.v1 import federation_pb2 as pb

Value = bool | int | float | str | bytes
Records = Mapping[str, Mapping[str, Value]]

MAX_RECORDS, MAX_ENTRIES = 64, 1024
_LARGEST = 2**63


def encode_content(records: Records) -> bytes:
    """Serialise; equal records give equal bytes.

    Raises:
        UpdateError: a value of another type, an integer beyond 64 bits, or too many of them.
    """
    if len(records) > MAX_RECORDS or any(len(entries) > MAX_ENTRIES for entries in records.values()):
        raise UpdateError(f"content holds at most {MAX_RECORDS} records of {MAX_ENTRIES} values; send fewer")
    content = pb.Content()
    for record_name in sorted(records):
        record = content.records.add(name=record_name)
        for name in sorted(records[record_name]):
            _write(record.entries.add(name=name), records[record_name][name])
    return content.SerializeToString(deterministic=True)


def decode_content(payload: bytes, *, who: str) -> dict[str, dict[str, Value]]:
    """Inverse of `encode_content`, for bytes that came from outside.

    Args:
        who: named in errors.

    Raises:
        UpdateError: not a content, too many records or values, a name twice, or a value of no known type.
    """
    try:
        content = pb.Content.FromString(payload)
    except DecodeError as error:
        raise UpdateError(f"{who}: {len(payload)} bytes came that are no content (foreign or cut)") from error
    if len(content.records) > MAX_RECORDS:
        raise UpdateError(f"{who}: {len(content.records)} records came, at most {MAX_RECORDS} are accepted")
    records: dict[str, dict[str, Value]] = {}
    for record in content.records:
        if len(record.entries) > MAX_ENTRIES:
            raise UpdateError(
                f"{who}: a record of {len(record.entries)} values came, {MAX_ENTRIES} are accepted"
            )
        entries = {entry.name: _read(entry, who) for entry in record.entries}
        if record.name in records or len(entries) != len(record.entries):
            raise UpdateError(f"{who}: the content has a name twice")
        records[record.name] = entries
    return records


def _write(entry: pb.Entry, value: Value) -> None:
    if isinstance(value, bool):  # before int, of which it is a kind
        entry.flag = value
    elif isinstance(value, int):
        if not -_LARGEST <= value < _LARGEST:
            raise UpdateError(f"value {entry.name!r} is beyond 64 bits and cannot be sent")
        entry.integer = value
    elif isinstance(value, float):
        entry.number = value
    elif isinstance(value, str):
        entry.text = value
    elif isinstance(value, bytes):
        entry.data = value
    else:
        raise UpdateError(
            f"value {entry.name!r} is {type(value).__name__}; bool, int, float, str and bytes can be sent"
        )


def _read(entry: pb.Entry, who: str) -> Value:
    kind = entry.WhichOneof("value")
    if kind is None:
        raise UpdateError(f"{who}: value {entry.name!r} is of no type that this version knows; update it")
    value: Value = getattr(entry, kind)
    return value
