"""Whatever a person can name is named on a page: commands, options, keys, entries of tables, variables."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from pydantic import BaseModel

from docs.generate import pages
from fedpeft import errors
from fedpeft.adapters import METHODS as MERGES
from fedpeft.cli import app
from fedpeft.cli_help import build_command
from fedpeft.commands.catalogue import catalogue
from fedpeft.config.sections import RunConfig
from fedpeft.data.readers import READERS
from fedpeft.reporting.sinks import SINKS
from fedpeft_client.client_settings import ClientSettings
from fedpeft_server.ops.server_settings import ServerSettings
from fedpeft_server.server_metrics import PREFIX, ServerMetrics

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    path.relative_to(ROOT / "docs").as_posix(): path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "docs").rglob("*.md"))
}
GENERATED = pages()
WRITTEN = "\n".join(text for name, text in PAGES.items() if name not in GENERATED)  # by people
ALL = "\n".join(PAGES.values()) + (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", GENERATED)
def test_generated_pages_are_what_the_code_says(name: str) -> None:
    assert PAGES[name] == GENERATED[name], "run: make reference"


# ---- Commands


def walk(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from walk(below, f"{path} {name}")


COMMANDS = dict(walk(build_command(app), "fedpeft"))


@pytest.mark.parametrize("path", COMMANDS)
def test_every_command_is_told_of_on_a_page_that_people_wrote(path: str) -> None:
    program, _, rest = path.rpartition(" ")
    listed = re.findall(
        rf"{re.escape(program)} ((?:[a-z-]+ \| )+[a-z-]+)", WRITTEN
    )  # fedpeft run list | show
    assert re.search(rf"\b{re.escape(path)}\b", WRITTEN) or any(rest in each.split(" | ") for each in listed)


def section(page: str, heading: str) -> str:
    """A page's part below a heading, up to the next one of any level."""
    _, found, after = page.partition(f"\n{heading}\n")
    return re.split(r"^#+ ", after, maxsplit=1, flags=re.MULTILINE)[0] if found else ""


@pytest.mark.parametrize("path", [path for path in COMMANDS if path != "fedpeft"])
def test_every_option_is_in_the_section_of_its_command(path: str) -> None:
    told = section(PAGES["commands.md"], f"### `{path}`")
    options = {
        option for parameter in COMMANDS[path].params for option in parameter.opts if option[:1] == "-"
    }
    assert told
    assert [option for option in sorted(options) if not re.search(rf"{option}\b", told)] == []


# ---- Keys


def models_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from models_in(inner)


def keys_of(model: type[BaseModel], table: str = "") -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        yield table, name
        for inner in models_in(field.annotation):
            yield from keys_of(inner, f"{table}.{name}".lstrip("."))


@pytest.mark.parametrize(
    ("page", "model"),
    [("run-file.md", RunConfig), ("settings.md", ServerSettings), ("settings.md", ClientSettings)],
)
def test_every_key_is_in_the_section_of_its_table(page: str, model: type[BaseModel]) -> None:
    headings = [line for line in PAGES[page].splitlines() if line.startswith("#")]
    missing = []
    for table, name in keys_of(model):
        own = [line for line in headings if re.match(rf"#+ `\[\[?{re.escape(table)}\]\]?`", line)]
        if not table and page == "run-file.md":
            assert any(f"[{name}]" in line for line in headings), name
        elif not any(f"| `{name}` |" in section(PAGES[page], line) for line in own or headings):
            missing.append(f"{table}.{name}")
    assert missing == []


# ---- Entries of tables

TABLES: dict[str, list[str]] = {
    **{key: [entry.name for entry in entries] for key, entries in catalogue().items()},
    "formats of rows": list(READERS),
    "rules of merge": list(MERGES),
    "sinks": list(SINKS),
}


@pytest.mark.parametrize("table", TABLES)
def test_every_entry_of_a_table_is_named(table: str) -> None:
    known = ALL.replace('"', "`").replace("'", "`")
    assert [name for name in TABLES[table] if f"`{name}`" not in known] == []


def test_every_exit_code_is_named() -> None:
    told = section(PAGES["commands.md"], "## Exit codes")
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    codes = {kind.exit_code for kind in kinds if issubclass(kind, errors.FedPEFTError)}
    assert len(codes) > 10
    assert [code for code in codes if f"| {code} |" not in told] == []


def test_every_variable_is_named() -> None:
    ours = re.compile(r"\bFEDPEFT_[A-Z]+\b")
    told = set(ours.findall(section(PAGES["commands.md"], "## Environment")))
    bound = {
        parameter.envvar
        for command in COMMANDS.values()
        for parameter in command.params
        if isinstance(parameter.envvar, str)
    }
    read = {
        name
        for folder in ("fedpeft", "server", "client")
        for path in (ROOT / folder).rglob("*.py")
        for name in re.findall(
            r"environ(?:\.get\(|\[)\"(FEDPEFT_[A-Z_]+)\"", path.read_text(encoding="utf-8")
        )
    }
    assert bound | read == told
    assert len(told) > 3


def test_every_number_of_a_server_is_named() -> None:
    metrics = ServerMetrics()
    names = [
        family.name.removeprefix(PREFIX) for family in metrics.registry.collect() if PREFIX in family.name
    ]
    assert len(names) > 5
    assert [name for name in names if f"`{name}" not in PAGES["operations.md"]] == []


def test_every_target_of_make_is_named() -> None:
    targets = re.findall(r"^([a-z-]+):.*  ## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    texts = ALL + (ROOT / "CONTRIBUTING.md").read_text()
    assert [name for name in targets if f"make {name}" not in texts] == []


# ---- The tests themselves


def test_what_no_page_names_is_found() -> None:
    page = "# A\n\n## `[a]`\n\n| `x` |\n\n## `[b]`\n\n| `y` |\n"
    assert "`x`" in section(page, "## `[a]`")
    assert "`y`" not in section(page, "## `[a]`")
    assert section(page, "## `[c]`") == ""
    assert ("federation.buffer", "size") in set(keys_of(RunConfig))
