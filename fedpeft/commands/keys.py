"""`fedpeft keys`."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from fedpeft.config.key_reference import Key, Table, schema_of, tables_of
from fedpeft.config.sections import RunConfig
from fedpeft.errors import UsageError


def keys_command(model: type[BaseModel], place: str | None, *, as_schema: bool, as_json: bool) -> None:
    """Print what a file can hold: its tables and keys, all of them or those at `place`.

    Args:
        model: of the file.
        place: a table, such as federation.buffer, with those within it, or one key, such as training.lr.
        as_schema: print the whole file's JSON schema instead.
        as_json: print one JSON object.

    Raises:
        UsageError: there is no such table or key.
    """
    if as_schema:
        print(json.dumps(_schema(model), indent=1))
        return
    tables = _tables_at(tables_of(model), place)
    names = _names(tables) if model is RunConfig else {}
    if as_json:
        print(json.dumps([_plain(table, names) for table in tables]))
        return
    console = Console(file=sys.stdout, highlight=False)
    for number, table in enumerate(tables):
        if number:
            console.print()
        _print_table(console, table, names)


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    if model is not RunConfig:
        return schema_of(model)
    from fedpeft.commands.named_options import run_schema  # with the tables of names, which take seconds

    return run_schema()


Names = dict[tuple[str, str], dict[str, tuple[Key, ...]]]
"""Table and key to what the key can name, each with the keys that come with it."""


def _names(tables: Sequence[Table]) -> Names:
    from fedpeft.commands.named_options import entries_of, option_keys  # as above

    return {
        (table.name, key): {entry.name: option_keys(table.name, entry.name) for entry in entries}
        for table in tables
        for key, entries in entries_of(table).items()
    }


def _tables_at(tables: Sequence[Table], place: str | None) -> list[Table]:
    """Keep a table and those within it, or of one table one key."""
    if place is None:
        return [
            table for table in tables if table.name or any("table" not in key.values for key in table.keys)
        ]
    asked = place.strip("[]")
    found = [table for table in tables if f"{table.name}.".startswith(f"{asked}.")]
    if found:
        return found
    before, _, name = asked.rpartition(".")
    for table in tables:
        keys = tuple(key for key in table.keys if key.name == name)
        if table.name == before and keys:
            found.append(
                Table(table.name, table.repeated, table.variant, table.open, table.description, keys)
            )
    if not found:
        raise UsageError(_unknown(tables, asked))
    return found


def _unknown(tables: Sequence[Table], asked: str) -> str:
    known = {f"{table.name}.{key.name}".lstrip(".") for table in tables for key in table.keys}
    known |= {table.name for table in tables if table.name}
    inside = [name for name in sorted(known) if name.rpartition(".")[2] == asked.rpartition(".")[2]]
    near = inside or difflib.get_close_matches(asked, sorted(known), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{asked!r} is no table or key of this file{hint}; fedpeft keys without a name lists all"


def _print_table(console: Console, table: Table, names: Names) -> None:
    if table.heading:
        heading = Text(table.heading, style="bold")
        if table.variant:
            heading.append(f'  kind = "{table.variant}"')
        console.print(heading)
        console.print(
            Padding(
                Text(table.description.partition("\n\n")[0].replace("\n", " ")), (0, 0, 0, 2), expand=False
            )
        )
    for key in table.keys:
        console.print(Padding(_first_line(key), (0, 0, 0, 2), expand=False))
        console.print(Padding(Text(key.description), (0, 0, 0, 6), expand=False))
        for line in _name_lines(names.get((table.name, key.name), {})):
            console.print(Padding(Text(line, style="dim"), (0, 0, 0, 6), expand=False))


def _name_lines(names: Mapping[str, Sequence[Key]]) -> Iterator[str]:
    """Write the names that come without keys in one line, and each other one with its keys."""
    bare = [name for name, options in names.items() if not options]
    if bare:
        yield f"one of: {', '.join(bare)}"
    for name, options in names.items():
        if options:
            yield f"{name}: " + ", ".join(
                f"{key.name}{f' = {key.default}' if key.default else ''}" for key in options
            )


def _first_line(key: Key) -> Text:
    """Name, default, and in brackets what it takes and its unit."""
    line = Text(key.name, style="bold")
    if key.default:
        line.append(f" = {key.default}", style="not bold")
    takes = f"{key.values}, {key.unit}" if key.unit else key.values
    return line.append(f"  ({takes}{', needed' if key.needed else ''})", style="not bold dim")


def _plain(table: Table, names: Names) -> dict[str, Any]:
    keys = [{**asdict(key), "names": list(names.get((table.name, key.name), {}))} for key in table.keys]
    return {**asdict(table), "keys": keys}
