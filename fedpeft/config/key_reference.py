"""The keys of a file as its models describe them: rows for a reference, and a JSON schema for editors.

Everything here follows from the JSON schema that pydantic writes of a model, so a key that is added to a
model is in the reference, in `fedpeft keys` and in editors' completions without another line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

Schema = Mapping[str, Any]
DIALECT = "https://json-schema.org/draft/2020-12/schema"


@dataclass(frozen=True)
class Key:
    """One key of a table.

    Attributes:
        name: as it stands in its table.
        values: what it takes, in words: "integer >= 1", "'csv' or 'none'", "table".
        unit: of a number; empty where there is none.
        default: as it would stand in the file; empty where the key has no value of its own then.
        needed: the file must have it.
        description: one or two sentences.
    """

    name: str
    values: str
    unit: str
    default: str
    needed: bool
    description: str


@dataclass(frozen=True)
class Table:
    """One table of a file, with its keys.

    Attributes:
        name: dotted; empty for the keys that stand before the first table.
        repeated: it is one of several, ``[[name]]``.
        variant: the value of its `kind`, where tables of one name have keys that depend on it.
        open: further keys are taken, and checked by what `kind` or `method` names.
    """

    name: str
    repeated: bool
    variant: str
    open: bool
    description: str
    keys: tuple[Key, ...]

    @property
    def heading(self) -> str:
        """How the table is written in the file: ``[name]`` or ``[[name]]``."""
        if not self.name:
            return ""
        return f"[[{self.name}]]" if self.repeated else f"[{self.name}]"


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON schema of a file's model, without nulls, which TOML has not, and without titles."""
    schema: dict[str, Any] = _without_nulls(model.model_json_schema())
    return {"$schema": DIALECT, **schema}


def tables_of(model: type[BaseModel]) -> tuple[Table, ...]:
    """Return every table of a file in the order of the models; a table stands before those within it."""
    schema = schema_of(model)
    return tuple(_tables(schema, schema, ""))


def options_of(model: type[BaseModel]) -> tuple[Key, ...]:
    """Return the keys that a stage, space, attack or the like takes beside its `kind`."""
    schema = schema_of(model)
    return tuple(_key(schema, name, each, schema) for name, each in schema.get("properties", {}).items())


def _tables(
    schema: Schema, table: Schema, name: str, *, repeated: bool = False, variant: str = ""
) -> Iterator[Table]:
    properties = table.get("properties", {})
    keys = tuple(_key(schema, key, each, table) for key, each in properties.items())
    description = str(table.get("description", ""))
    yield Table(name, repeated, variant, table.get("additionalProperties") is True, description, keys)
    for key, each in properties.items():
        inner = _parts(schema, each)
        is_list = any(part.get("type") == "array" for part in inner)
        found = [part for item in inner for part in _parts(schema, item.get("items", item))]
        found = [part for part in found if "properties" in part]
        for part in found:
            kind = str(part["properties"].get("kind", {}).get("const", "")) if len(found) > 1 else ""
            yield from _tables(schema, part, f"{name}.{key}".lstrip("."), repeated=is_list, variant=kind)


def _parts(schema: Schema, part: Schema) -> list[Schema]:
    """Return what a schema is one of, with references followed."""
    if "$ref" in part:
        followed: Schema = schema["$defs"][part["$ref"].rpartition("/")[2]]
        return [followed]
    for word in ("anyOf", "oneOf"):
        if word in part:
            return [inner for each in part[word] for inner in _parts(schema, each)]
    return [part]


def _key(schema: Schema, name: str, each: Schema, table: Schema) -> Key:
    parts = _parts(schema, each)
    words = list(dict.fromkeys(_values(schema, part) for part in parts))
    units = [str(part["unit"]) for part in (each, *each.get("anyOf", ())) if "unit" in part]
    is_table = any("properties" in part for part in parts)
    default = "" if "default" not in each or is_table else to_toml(each["default"])
    return Key(
        name=name,
        values=" or ".join(words),
        unit=next(iter(units), ""),
        default=default,
        needed=name in table.get("required", ()),
        description=str(each.get("description", "")),
    )


_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def _values(schema: Schema, part: Schema) -> str:
    """Say in words which values a schema takes."""
    if "const" in part or "enum" in part:
        return " or ".join(to_toml(value) for value in part.get("enum", [part.get("const")]))
    kind = part.get("type")
    if kind == "array":
        return "list of " + " or ".join(
            _plural(_values(schema, item)) for item in _parts(schema, part["items"])
        )
    if kind == "object":
        return "table"
    bounds = [f"{sign} {_number(part[word])}" for word, sign in _BOUNDS.items() if word in part]
    return " ".join([{"boolean": "true or false"}.get(str(kind), str(kind)), " and ".join(bounds)]).strip()


def _number(value: float) -> str:
    """Write a bound; powers of two that are as large as integers get are written as such."""
    exponent = int(value).bit_length() - 1
    return f"2**{exponent}" if exponent > 31 and int(value) == 1 << exponent else f"{value:g}"


def _plural(word: str) -> str:
    return f"{word}s" if word in ("string", "integer", "number", "table") else word


def to_toml(value: Any) -> str:
    """Write a default as it would stand in a file.

    >>> to_toml(["a", True, 0.5])
    '["a", true, 0.5]'
    """
    if isinstance(value, Mapping) and value:
        return "{ " + ", ".join(f"{key} = {to_toml(each)}" for key, each in value.items()) + " }"
    return json.dumps(value)


def _without_nulls(part: Any) -> Any:
    """Drop titles, nulls and what may be null, and what held nothing else."""
    if isinstance(part, list):
        return [_without_nulls(each) for each in part if each != {"type": "null"}]
    if not isinstance(part, dict):
        return part
    kept = {
        key: {name: _without_nulls(each) for name, each in value.items()}
        if key in ("properties", "$defs")
        else value
        if key == "default"
        else _without_nulls(value)
        for key, value in part.items()
        if not (key == "title" or (key == "default" and _holds_null(value)))
    }
    choices = kept.get("anyOf")
    if isinstance(choices, list) and len(choices) == 1:
        del kept["anyOf"]
        return {**choices[0], **kept}
    return kept


def _holds_null(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and any(_holds_null(each) for each in value.values()))
