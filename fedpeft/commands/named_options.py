"""Where the names of the catalogue stand in a run file, and which keys come with each of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from fedpeft.aggregation.staleness import WEIGHTS
from fedpeft.attacks import ATTACKS
from fedpeft.commands.catalogue import CatalogueEntry, catalogue
from fedpeft.config.key_reference import Key, Table, options_of, schema_of, to_toml
from fedpeft.config.sections import RunConfig
from fedpeft.rounds.strategy_table import RULES
from fedpeft.spaces import SPACES
from fedpeft.stages import STAGES

_MODELS: Mapping[str, Mapping[str, type[BaseModel]]] = {
    "space": SPACES,
    "stages": STAGES,
    "downlink": STAGES,
    "federation.attack": ATTACKS,
    "federation.buffer.staleness_weight": WEIGHTS,
}
"""Table of a run file to the models of what its `kind` names."""


def entries_of(table: Table) -> dict[str, tuple[CatalogueEntry, ...]]:
    """Return the names that a table's keys can hold, by key; those of no single key under an empty text."""
    sections = catalogue()
    found = {}
    for section, entries in sections.items():
        place, _, about = section.partition(" ")
        if place == table.name:
            found["" if about else "kind"] = entries
        elif place.rpartition(".")[0] == table.name:
            found[place.rpartition(".")[2]] = entries
    if table.name == "downlink":
        lossy = {name for name, stage in STAGES.items() if stage.role == "lossy"}
        found["kind"] = tuple(entry for entry in sections["stages"] if entry.name in lossy)
    return found


def option_keys(table: str, name: str) -> tuple[Key, ...]:
    """Return the keys that come with a `kind` of a table of the run file."""
    if table == "federation.strategy":
        return tuple(_parameter(each) for each in RULES[name].options.values())
    models = _MODELS.get(table, {})
    return options_of(models[name]) if name in models else ()


def _parameter(parameter: inspect.Parameter) -> Key:
    """Describe an option that Flower's class takes by name."""
    needed = parameter.default is inspect.Parameter.empty
    default = "" if needed or parameter.default is None else to_toml(parameter.default)
    return Key(parameter.name, "number", "", default, needed, "")


def run_schema() -> dict[str, Any]:
    """Return the JSON schema of a run file, with the names and options of every table as completions.

    A name or an option that is not among them is no error to an editor, since other packages may add names:
    `fedpeft plan` has the last word.
    """
    schema = schema_of(RunConfig)
    definitions: dict[str, Any] = schema["$defs"]
    for section, entries in catalogue().items():
        names = [entry.name for entry in entries]
        for model, key in _places(section):
            properties = definitions[model]["properties"]
            if key in properties:
                properties[key] = _suggest(properties[key], names)
    for model, table in _OPEN.items():
        definitions[model]["anyOf"] = [*_variants(table), {"required": []}]
    return schema


_OPEN = {
    "SpaceSection": "space",
    "StageSection": "stages",
    "AttackSection": "federation.attack",
    "StalenessSection": "federation.buffer.staleness_weight",
    "StrategySection": "federation.strategy",
}
"""Definition in the schema to the table of the run file; these take further keys, by their `kind`."""

_SECTIONS = {
    "peft": "PeftSection",
    "training": "TrainingSection",
    "federation": "FederationSection",
    "evaluation": "EvaluationSection",
}


def _places(section: str) -> Iterator[tuple[str, str]]:
    """Yield the definition and the key that hold the names of a section of the catalogue."""
    yield from ((model, "kind") for model, table in _OPEN.items() if table == section)
    table, _, key = section.partition(".")
    if table in _SECTIONS:
        yield _SECTIONS[table], key


def _suggest(part: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Let a text be one of `names`, as completions, or any other."""
    if part.get("type") == "array":
        return {**part, "items": _suggest(part["items"], names)}
    if part.get("type") != "string" or "enum" in part:
        return dict(part)
    return {**part, "anyOf": [{"enum": list(names)}, {"type": "string"}]}


def _variants(table: str) -> Iterator[dict[str, Any]]:
    """Yield one schema for each `kind` of a table, with its options."""
    for name, model in _MODELS.get(table, {}).items():
        schema = schema_of(model)
        properties = {"kind": {"const": name}, **schema.get("properties", {})}
        yield {"title": name, "properties": properties, "required": ["kind", *schema.get("required", ())]}
    for name, rule in RULES.items() if table == "federation.strategy" else ():
        options = {key: {"type": "number"} for key in rule.options}
        yield {"title": name, "properties": {"kind": {"const": name}, **options}, "required": ["kind"]}
