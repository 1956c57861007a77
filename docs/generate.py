"""Write the reference pages of this folder from the code: `make reference`, which a test repeats.

Question: what can be written in a run file, in the settings, and on the command line?
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import click
from pydantic import BaseModel

import fedpeft
from fedpeft import errors
from fedpeft.adapters import METHODS as MERGES
from fedpeft.cli import app
from fedpeft.cli_help import EXAMPLES, SECTIONS, build_command
from fedpeft.commands.catalogue import CatalogueEntry
from fedpeft.commands.named_options import entries_of, option_keys
from fedpeft.config.key_reference import Key, Table, tables_of
from fedpeft.config.sections import RunConfig
from fedpeft_client.client_settings import ClientSettings
from fedpeft_server.ops.server_settings import ServerSettings
from tests.test_architecture import LAYERS

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
NOTE = "<!-- Written by `make reference` from the code; change the descriptions there. -->"


def pages() -> dict[str, str]:
    """Return the text of every generated page by its file name."""
    return {
        "run-file.md": _page(_run_file()),
        "settings.md": _page(_settings()),
        "commands.md": _page(_commands()),
        "packages.md": _page(_packages()),
        "api.md": _page(_api()),
    }


def _prose(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 110, break_on_hyphens=False, break_long_words=False)


def _page(blocks: Iterable[str]) -> str:
    return "\n\n".join([NOTE, *blocks]) + "\n"


# ---- Keys


def _run_file() -> Iterator[str]:
    yield "# What a run file can say"
    yield _prose("""
        A run file is TOML. Only `[run]` with `name` and `rounds` is needed; every other key has a default,
        and unknown keys are refused. `fedpeft keys SECTION` prints this page in the terminal, `fedpeft
        methods` the names alone, `fedpeft plan RUN.toml` what a file would do. On the command line `--set
        training.lr=5e-4` overrides a key.
        """)
    yield _prose("""
        Editors complete keys and names, and say what is wrong, from a JSON schema (VS Code with Even Better
        TOML, and every other one with taplo). Write it once beside the run file, and name it in the file's
        first line:
        """)
    yield "```sh\nfedpeft keys --schema > fedpeft.schema.json\n```"
    yield '```toml\n#:schema ./fedpeft.schema.json\n[run]\nname = "my-run"\nrounds = 20\n```'
    yield _prose("""
        A default is written as it would stand in the file; a key without one says in words what holds then.
        The options of a PEFT method are those of its configuration in `peft`, by `peft`'s names, and are
        not repeated here.
        """)
    for table in tables_of(RunConfig):
        if table.name:
            yield from _table(table, 2)
            yield from _names(table)


def _settings() -> Iterator[str]:
    yield "# What server.toml and client.toml can say"
    yield _prose("""
        Both are TOML and refuse unknown keys; options on the command line go over them, and relative paths
        are relative to the file. `server/server.toml` and `client/client.toml` are examples to copy. In the
        terminal: `fedpeft keys --of server` and `fedpeft keys --of client`; schemas for editors, as for
        [run files](run-file.md): `fedpeft keys --of server --schema`.
        """)
    for name, model in (("server.toml", ServerSettings), ("client.toml", ClientSettings)):
        yield f"## {name}"
        for table in tables_of(model):
            yield from _table(table, 3)


def _table(table: Table, level: int) -> Iterator[str]:
    if table.name:
        variant = f" of kind `{table.variant}`" if table.variant else ""
        yield f"{'#' * level} `{table.heading}`{variant}"
    yield table.description
    rows = [(f"`{key.name}`", _takes(key), _default(key), _cell(key.description)) for key in table.keys]
    yield _rows(("key", "takes", "default", "what it is"), rows)


def _takes(key: Key) -> str:
    return _cell(f"{key.values}, {key.unit}" if key.unit else key.values)


def _default(key: Key) -> str:
    return "needed" if key.needed else f"`{key.default}`" if key.default else ""


def _names(table: Table) -> Iterator[str]:
    for key, entries in entries_of(table).items():
        title = f"Names of `{key}` in `{table.heading}`" if key else f"What saves memory in `{table.heading}`"
        yield f"**{title}**"
        yield _entries(table, entries)


def _entries(table: Table, entries: Sequence[CatalogueEntry]) -> str:
    if table.name == "downlink":
        return ", ".join(f"`{entry.name}`" for entry in entries) + ": see `[[stages]]` above."
    rows = [
        (
            f"`{entry.name}`",
            _cell(entry.summary + (f" ({', '.join(entry.flags)})" if entry.flags else "")),
            "<br>".join(_option(key) for key in option_keys(table.name, entry.name)),
        )
        for entry in entries
    ]
    if not any(options for _, _, options in rows):
        return _rows(("name", "what it is"), [row[:2] for row in rows])
    return _rows(("name", "what it is", "options"), rows)


def _option(key: Key) -> str:
    value = f"`{key.name} = {key.default}`" if key.default else f"`{key.name}`"
    takes = "" if key.values == "number" else f" ({_takes(key)}{', needed' if key.needed else ''})"
    return f"{value}{takes}{f': {_cell(key.description)}' if key.description else ''}"


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    for sign, escaped in (("|", "\\|"), ("<", "&lt;"), ("[", "\\[")):
        text = text.replace(sign, escaped)
    return " ".join(text.split())


# ---- Commands


def _commands() -> Iterator[str]:
    root = build_command(app)
    yield "# What each command takes"
    yield "With `--help` each command prints the same. `--json`, where a command has it, is for programs."
    commands: dict[str, click.Command] = getattr(root, "commands", {})
    for heading, names in SECTIONS.items():
        yield f"## {heading}"
        for name in names:
            yield from _command(commands[name], name)
    yield "## Names of `fedpeft merge --method`"
    yield _rows(
        ("name", "what it is"), [(f"`{name}`", _cell(_first_line(rule))) for name, rule in MERGES.items()]
    )
    yield "## Exit codes"
    yield "A command that fails prints a line for each problem: what came, what is needed and what to do."
    yield _rows(("code", "what failed"), _exit_codes())
    yield "## Environment"
    yield _rows(("variable", "stands for"), _environment(root))


def _command(command: click.Command, path: str) -> Iterator[str]:
    context = click.Context(command, info_name=f"fedpeft {path}")
    yield f"### `fedpeft {path}`"
    yield " ".join((command.help or "").split())
    records = [parameter.get_help_record(context) for parameter in command.get_params(context)]
    rows = [
        (f"`{record[0]}`", _cell(record[1])) for record in records if record and "--help" not in record[0]
    ]
    if rows:
        yield _rows(("takes", "what it is"), [(name.replace("|", "\\|"), text) for name, text in rows])
    if path in EXAMPLES:
        yield "```sh\n" + "\n".join(EXAMPLES[path]) + "\n```"
    for name, inner in getattr(command, "commands", {}).items():
        yield from _command(inner, f"{path} {name}")


def _exit_codes() -> list[tuple[str, str]]:
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and kind.__module__ == errors.__name__
    ]
    roots = {kind.exit_code: kind for kind in reversed(kinds) if issubclass(kind, errors.FedPEFTError)}
    rows = [("0", "nothing")]
    rows += [
        (str(code), _cell(_first_line(kind).partition(";")[0]))
        for code, kind in sorted(roots.items())
        if code != 1
    ]
    return [*rows, ("1", "anything else"), ("130", "Ctrl-C")]


def _environment(root: click.Command) -> list[tuple[str, str]]:
    found = {"FEDPEFT_LOG": "how much an agent logs: DEBUG, INFO, WARNING or ERROR"}
    for path, command in _walk(root, ""):
        for parameter in command.params:
            if isinstance(parameter.envvar, str):
                found.setdefault(parameter.envvar, f"`{parameter.opts[0]}` of `fedpeft {path}` and others")
    return [(f"`{name}`", text) for name, text in sorted(found.items())]


def _walk(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from _walk(inner, f"{path} {name}".strip())


# ---- Packages


def _packages() -> Iterator[str]:
    yield "# What is in which package?"
    yield _prose("""
        A package or module of `fedpeft` imports only from layers above its own in this list; those of one
        layer don't know each other. [Architecture](architecture.md) says what the layers are for.
        """)
    for number, layer in enumerate(LAYERS, start=1):
        rows = [(f"`{name}`", _cell(_docstring(path).rstrip("."))) for name, path in map(_located, layer)]
        yield f"## Layer {number}"
        yield _rows(("where", "what it is"), rows)


def _located(room: str) -> tuple[str, Path]:
    """Return the name and the file of a package or module of one of our three packages."""
    if room == "version":
        return "fedpeft", ROOT / "fedpeft" / "__init__.py"
    for base in (ROOT / "fedpeft", ROOT / "server", ROOT / "client"):
        found = [base / room / "__init__.py", base / f"{room}.py"]
        if path := next((each for each in found if each.exists()), None):
            return (f"fedpeft.{room}" if base.name == "fedpeft" else room), path
    raise LookupError(room)


def _docstring(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n\n")[0]


# ---- Python


def _api() -> Iterator[str]:
    yield "# How do I call it from Python?"
    yield _prose("""
        What `import fedpeft` gives is public: this page. What lies below it may change with any version.
        Names are loaded when they are first used.
        """)
    yield """```python
import fedpeft

result = fedpeft.simulate("run.toml", ["run.rounds=5"], out="runs/first")
result.metrics[-1], result.adapter
```"""
    yield "[Extending](extending.md) has examples of stages, strategies, methods and metrics of your own."
    names = [name for name in fedpeft.__all__ if not name.startswith("_")]
    found = {name: getattr(fedpeft, name) for name in names}
    failures = [name for name, each in found.items() if inspect.isclass(each) and issubclass(each, Exception)]
    kinds = [name for name, each in found.items() if inspect.isclass(each) and name not in failures]
    calls = [name for name in names if name not in (*failures, *kinds)]
    for heading, some in (("Functions", calls), ("Classes", kinds), ("Errors", failures)):
        yield f"## {heading}"
        for name in some:
            members = "\n      members: []" if _is_model(found[name]) else ""
            yield f"::: {found[name].__module__}.{name}\n    options:\n      heading: fedpeft.{name}{members}"


def _is_model(kind: object) -> bool:
    """Whether it is a model of the run file, whose keys have a page of their own."""
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _first_line(thing: object) -> str:
    return (thing.__doc__ or "").strip().partition("\n")[0].rstrip(".")


def main() -> None:
    """Write the pages, and name those that changed."""
    for name, text in pages().items():
        path = FOLDER / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"{path} changed", file=sys.stderr)


if __name__ == "__main__":
    main()
