"""What `--help` shows: commands in groups, examples, and the help of arguments.

The pinned typer and newer versions of click lose the help of arguments on the way (click's own attribute
takes its place) and escape brackets for a renderer that isn't in use; both are mended here, for every
command, after typer built them.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any

import click
import typer
from typer.core import TyperArgument, TyperGroup
from typer.models import ParameterInfo

SECTIONS: dict[str, tuple[str, ...]] = {
    "On one machine": ("simulate", "plan", "evaluate", "export", "methods", "keys", "audit"),
    "Federations": ("server", "client", "run", "provision"),
    "Adapters as files": ("compress", "decompress", "merge", "replay", "emulator", "plug-in"),
}
"""Heading to commands; a command that no heading names stands under the last one, "Others"."""

EXAMPLES: dict[str, tuple[str, ...]] = {
    "simulate": (
        "fedpeft simulate",
        "fedpeft simulate run.toml --set training.lr=5e-4",
        "fedpeft simulate --resume runs/my-run",
    ),
    "plan": ("fedpeft plan run.toml", "fedpeft plan run.toml --fit 8GB"),
    "evaluate": ("fedpeft evaluate runs/my-run",),
    "export": ("fedpeft export runs/my-run --merge --out merged",),
    "keys": ("fedpeft keys training", "fedpeft keys --of client policy", "fedpeft keys --schema"),
    "compress": ("fedpeft compress runs/my-run --out adapter.fpz",),
    "merge": ("fedpeft merge runs/a runs/b --out merged --method task-arithmetic",),
    "provision": ("fedpeft provision federation --host server.example --agent ward-a --admin me",),
    "server": ("fedpeft server --keys federation/server --authority federation/ca --listen 0.0.0.0:9440",),
    "client": (
        "fedpeft client --server server.example:9440 --keys federation/agents/ward-a --data ward-a.jsonl",
    ),
    "run submit": ("fedpeft run submit run.toml --server server.example:9440 --keys federation/admins/me",),
}


class SectionedGroup(TyperGroup):
    """The root command, whose help lists commands by what they are for."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one list of commands per section."""
        named = {name for names in SECTIONS.values() for name in names}
        others = tuple(name for name in self.commands if name not in named)
        for heading, names in {**SECTIONS, "Others": others}.items():
            commands = [(name, self.commands[name]) for name in names if name in self.commands]
            lines = [
                (name, command.get_short_help_str(100)) for name, command in commands if not command.hidden
            ]
            if lines:
                with formatter.section(heading):
                    formatter.write_dl(lines)


def build_command(app: typer.Typer) -> click.Command:
    """Build the command line, with its help mended."""
    command = typer.main.get_command(app)
    _mend(command, "")
    return command


def _mend(command: click.Command, path: str) -> None:
    """Mend one command's help, and that of the commands below it."""
    hints = typing.get_type_hints(command.callback, include_extras=True) if command.callback else {}
    for parameter in command.params:
        text = _help_of(hints.get(str(parameter.name))) if isinstance(parameter, TyperArgument) else None
        parameter.get_help_record = _wrap_error(parameter, text)  # type: ignore[assignment]  # one instance's
    if path in EXAMPLES:
        command.epilog = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in EXAMPLES[path])
    for name, below in getattr(command, "commands", {}).items():
        _mend(below, f"{path} {name}".strip())


def _help_of(hint: Any) -> str | None:
    """Return the help that a parameter's annotation gives."""
    infos = [each for each in getattr(hint, "__metadata__", ()) if isinstance(each, ParameterInfo)]
    return infos[0].help if infos else None


Record = tuple[str, str] | None


def _wrap_error(parameter: click.Parameter, text: str | None) -> Callable[[click.Context], Record]:
    """Write a parameter's line with the help it lost, if any, and without escapes."""
    get_record = parameter.get_help_record

    def get_help_record(ctx: click.Context) -> Record:
        record = get_record(ctx)
        if record is None:
            return None
        name, line = record[0], record[1].replace("\\[", "[")
        return name, line if text is None or text in line else f"{text}  {line}".rstrip()

    return get_help_record
