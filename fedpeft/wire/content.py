"""What a task or a result holds, as bytes: typed values by name, in named records, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.message import DecodeError

from fedpeft.errors import UpdateError
from fedpeft.v1 import federation_pb2 as pb
from fedpeft.wire.fields import Field, MalformedError, length_delimited, number_of, read_varint

Value = bool | int | float | str | bytes
Records = Mapping[str, Mapping[str, Value]]

MAX_RECORDS, MAX_ENTRIES = 64, 1024
_LARGEST = 2**63
_BY_HAND = 64 * 1024  # bytes of a value from which on it is copied once, not twice as by protobuf
_RECORDS, _ENTRIES, _DATA = (
    number_of(pb.Content, "records"),
    number_of(pb.Record, "entries"),
    number_of(pb.Entry, "data"),
)


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


HEAD_BYTES = 32  # of a content, at least, to tell how it begins
_LONGEST_NAME = 16
_FIRST = b"\x0a"  # key of the first field of a content, and of a record: one that carries a length


def is_head_of_record(head: bytes, size: int) -> bool:
    """Whether bytes begin as a content that is one record and nothing else, as every result is.

    No pickle, archive or table begins so: what is not a result is not even written.

    Args:
        head: the first bytes, all of them or at least `HEAD_BYTES`.
        size: of the whole content.
    """
    try:
        if head[:1] != _FIRST:
            return False
        length, place = read_varint(head, 1, len(head))
        if place + length != size or head[place : place + 1] != _FIRST:
            return False
        named, place = read_varint(head, place + 1, len(head))
    except MalformedError:
        return False
    name = head[place : place + named]
    return 0 < named <= _LONGEST_NAME and len(name) == named and name.isalpha()


def decode_content(payload: bytes | memoryview, *, who: str) -> dict[str, dict[str, Value]]:
    """Inverse of `encode_content`, for bytes that came from outside; nothing refers to `payload` afterwards.

    Args:
        who: named in errors.

    Raises:
        UpdateError: not a content, too many records or values, a name twice, or a value of no known type.
    """
    try:
        rest, large = _split(payload, 0, len(payload), _RECORDS)
        small = pb.Content.FromString(rest).records
        if len(small) + len(large) > MAX_RECORDS:
            raise UpdateError(
                f"{who}: {len(small) + len(large)} records came, at most {MAX_RECORDS} are accepted"
            )
        pairs = [_record(record, {}, who) for record in small]
        pairs += [_large_record(payload, field, who) for field in large]
    except (DecodeError, MalformedError) as error:
        raise UpdateError(f"{who}: {len(payload)} bytes came that are no content (foreign or cut)") from error
    records = dict(pairs)
    if len(records) != len(pairs):
        raise _twice(who)
    return records


def _record(record: pb.Record, large: dict[str, Value], who: str) -> tuple[str, dict[str, Value]]:
    """A record's name and values, with those that were read by hand."""
    count = len(record.entries) + len(large)
    if count > MAX_ENTRIES:
        raise UpdateError(f"{who}: a record of {count} values came, {MAX_ENTRIES} are accepted")
    entries = {entry.name: _read(entry, who) for entry in record.entries} | large
    if len(entries) != count:
        raise _twice(who)
    return record.name, entries


def _large_record(payload: bytes | memoryview, field: Field, who: str) -> tuple[str, dict[str, Value]]:
    rest, fields = _split(payload, field.content, field.end, _ENTRIES)
    pairs = [_large_entry(payload, entry, who) for entry in fields]
    large = dict(pairs)
    if len(large) != len(pairs):
        raise _twice(who)
    return _record(pb.Record.FromString(rest), large, who)


def _large_entry(payload: bytes | memoryview, field: Field, who: str) -> tuple[str, Value]:
    rest, fields = _split(payload, field.content, field.end, _DATA)
    entry = pb.Entry.FromString(rest)
    if not fields:
        return entry.name, _read(entry, who)
    if len(fields) > 1 or entry.WhichOneof("value") is not None:
        raise UpdateError(f"{who}: value {entry.name!r} came twice")
    return entry.name, bytes(payload[fields[0].content : fields[0].end])


def _split(payload: bytes | memoryview, start: int, end: int, number: int) -> tuple[bytes, list[Field]]:
    """A message without its large fields of that number, and these."""
    if end - start < _BY_HAND:
        return bytes(payload[start:end]), []
    fields = length_delimited(payload, start, end)
    large = [field for field in fields if field.number == number and field.end - field.content >= _BY_HAND]
    places = [start, *(place for field in large for place in (field.key, field.end)), end]
    return b"".join(payload[a:b] for a, b in zip(places[::2], places[1::2], strict=True)), large


def _twice(who: str) -> UpdateError:
    return UpdateError(f"{who}: the content has a name twice")


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
