"""Every key that a file can hold says what it means, its unit and its default."""

from __future__ import annotations

import functools
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from fedpeft.aggregation.staleness import WEIGHTS
from fedpeft.attacks import ATTACKS
from fedpeft.config.sections import RunConfig
from fedpeft.spaces import SPACES
from fedpeft.stages import STAGES
from fedpeft_client.client_settings import ClientSettings
from fedpeft_server.ops.server_settings import ServerSettings

OPTION_MODELS: dict[str, type[BaseModel]] = {
    f"{table} {name}": model
    for table, models in (("stage", STAGES), ("space", SPACES), ("attack", ATTACKS), ("weight", WEIGHTS))
    for name, model in models.items()
}
MODELS: dict[str, type[BaseModel]] = {
    "run file": RunConfig,
    "server.toml": ServerSettings,
    "client.toml": ClientSettings,
    **OPTION_MODELS,
}


def models_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from models_in(inner)


def keys_of(model: type[BaseModel], before: str = "") -> Iterator[tuple[str, type[BaseModel], str]]:
    for name, field in model.model_fields.items():
        yield before + name, model, name
        for inner in models_in(field.annotation):
            yield from keys_of(inner, f"{before}{name}.")


Key = tuple[str, type[BaseModel], str]
KEYS: dict[str, tuple[Key, ...]] = {file: tuple(keys_of(root)) for file, root in MODELS.items()}


@functools.cache
def properties(model: type[BaseModel]) -> dict[str, Any]:
    found: dict[str, Any] = model.model_json_schema()["properties"]
    return found


def is_number(schema: dict[str, Any]) -> bool:
    return any(part.get("type") in ("integer", "number") for part in (schema, *schema.get("anyOf", ())))


def has_unit(schema: dict[str, Any]) -> bool:
    return any("unit" in part for part in (schema, *schema.get("anyOf", ())))


def test_the_walk_finds_the_keys() -> None:
    found = {f"{file}: {key}" for file, keys in KEYS.items() for key, _, _ in keys}
    assert {
        "run file: run.rounds",
        "run file: federation.buffer.staleness_weight.kind",
        "run file: privacy.clip_norm",
        "run file: stages.kind",
        "server.toml: limits.turn_s",
        "client.toml: policy.max_delta",
        "stage top-k: density",
    } <= found
    assert len(found) > 200


@pytest.mark.parametrize("file", MODELS)
def test_every_key_has_a_sentence(file: str) -> None:
    for key, model, name in KEYS[file]:
        text = model.model_fields[name].description or ""
        assert text.endswith("."), key
        assert text[:1].isupper(), key


NO_QUANTITY = ("run.seed",)  # numbers that count and measure nothing


@pytest.mark.parametrize("file", MODELS)
def test_every_number_has_a_unit(file: str) -> None:
    numbers = {key: properties(model)[name] for key, model, name in KEYS[file]}
    missing = [key for key, schema in numbers.items() if is_number(schema) and not has_unit(schema)]
    assert [key for key in missing if key not in NO_QUANTITY] == []


@pytest.mark.parametrize("file", MODELS)
def test_a_key_without_a_value_says_what_holds_then(file: str) -> None:
    fields = {key: model.model_fields[name] for key, model, name in KEYS[file]}
    silent = [
        key
        for key, field in fields.items()
        if not field.is_required() and field.default is None and "Default: " not in (field.description or "")
    ]
    assert silent == []
