"""Flower's message contents as bytes and back, for grids of ours that cross a process border."""

from __future__ import annotations

from flwr.app import ConfigRecord, RecordDict

from fedpeft.errors import UpdateError
from fedpeft.wire.content import Value, decode_content, encode_content


def content_bytes(content: RecordDict) -> bytes:
    """A content of config records as bytes.

    Raises:
        UpdateError: it holds something else; arrays travel encoded, as bytes.
    """
    records: dict[str, dict[str, Value]] = {}
    for name, record in content.items():  # not `config_records`, which would tie `content` into a cycle
        if not isinstance(record, ConfigRecord):
            raise UpdateError(
                "a message holds records that are no ConfigRecord; encode arrays before sending them"
            )
        records[name] = {}
        for key, value in record.items():
            if isinstance(value, list):
                raise UpdateError(f"value {key!r} is a list; only single values can be sent")
            records[name][key] = value
    return encode_content(records)


def content_of(payload: bytes | memoryview, *, who: str) -> RecordDict:
    """Inverse of `content_bytes`; raises what `decode_content` raises."""
    records = decode_content(payload, who=who)
    return RecordDict({name: ConfigRecord(dict(entries)) for name, entries in records.items()})
