"""What makes a run the run that it is: the keys that differ from their defaults, and a schema number.

A run is what its file says, not what a version's defaults are. Its identity is a canonical JSON text that
names only the keys whose values differ from their defaults, so a version that adds a key with a default
gives every earlier run the same text. A version that changes a default raises `RUN_SCHEMA` and lists the
old value in `_OLD_DEFAULTS`; it is written into runs of older schemas when they are read. The text is
stored and carried as it is; its SHA-256 is the run's digest, which nobody recomputes from the models of a
newer version.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

RUN_SCHEMA = 1

_OLD_DEFAULTS: Mapping[int, Mapping[str, Any]] = {}
"""Schema to the defaults that held up to and with it and changed after it, by dotted key."""


def identity_text(run: BaseModel) -> str:
    """Return the canonical JSON of a run: its schema number and the keys that differ from their defaults."""
    return json.dumps({"schema": RUN_SCHEMA, **differing_keys(run)}, sort_keys=True, separators=(",", ":"))


def identity_digest(text: str) -> str:
    """Return the digest of a run by its identity text: SHA-256, hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def differing_keys(section: BaseModel) -> dict[str, Any]:
    """Return the keys of a section that are required, extra, or not at their defaults, as JSON values."""
    plain = section.model_dump(mode="json")
    keys = {name: plain[name] for name in section.model_extra or {}}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if field.is_required() or value != field.get_default(call_default_factory=True):
            keys[name] = _differing_value(value, plain[name])
    return keys


def _differing_value(value: Any, plain: Any) -> Any:
    """Reduce a value that is a section, or a sequence of sections, to its differing keys."""
    if isinstance(value, BaseModel):
        return differing_keys(value)
    if isinstance(value, tuple | list) and any(isinstance(item, BaseModel) for item in value):
        return [_differing_value(item, each) for item, each in zip(value, plain, strict=True)]
    return plain


def read_identity(
    text: str,
    *,
    schema: int = RUN_SCHEMA,
    old_defaults: Mapping[int, Mapping[str, Any]] = _OLD_DEFAULTS,
) -> dict[str, Any]:
    """Return the tables of a run from its identity text, with defaults that have changed since written out.

    Args:
        schema: the newest schema that is known.
        old_defaults: see `_OLD_DEFAULTS`.

    Raises:
        ValueError: the text is no JSON object, or of a schema that this version does not know.
    """
    tables = json.loads(text)
    if not isinstance(tables, dict):
        raise ValueError("it is not a JSON object")
    came = tables.pop("schema", None)
    if not isinstance(came, int) or isinstance(came, bool) or not 1 <= came <= schema:
        raise ValueError(
            f"its schema is {came!r}, and this version knows 1 to {schema}; use the version that wrote it"
            " or a newer one"
        )
    for past in range(
        came, schema
    ):  # the first change after the run was written is of the default that it meant
        for dotted, value in old_defaults.get(past, {}).items():
            *folders, key = dotted.split(".")
            table = tables
            for folder in folders:
                table = table.setdefault(folder, {})
            table.setdefault(key, value)
    return tables
