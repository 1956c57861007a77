"""Help of every command: nothing is lost on the way through the libraries, nothing is shown twice."""

from __future__ import annotations

import inspect
import shlex
import typing
from collections.abc import Iterator

import click
import pytest
from typer.models import ParameterInfo

from fedpeft.cli import app
from fedpeft.cli_help import EXAMPLES, SECTIONS, build_command
from tests.commands.calling import Call

ROOT = build_command(app)


def walk(
    command: click.Command, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from walk(below, (*path, name))


COMMANDS = dict(walk(ROOT))


def test_the_walk_finds_commands() -> None:
    assert {("simulate",), ("run", "submit")} <= set(COMMANDS)
    assert len(COMMANDS) > 20


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_shows_what_the_code_says_of_every_parameter(path: tuple[str, ...], call: Call) -> None:
    command = COMMANDS[path]
    code, shown, _ = call(*path, "--help")
    assert code == 0
    words = " ".join(shown.split())
    assert "\\[" not in shown
    assert "Positional arguments" not in shown
    hints = typing.get_type_hints(command.callback, include_extras=True) if command.callback else {}
    infos = [each for hint in hints.values() for each in getattr(hint, "__metadata__", ())]
    texts = [each.help for each in infos if isinstance(each, ParameterInfo) and not each.hidden]
    assert None not in texts, "a parameter without help"
    assert [text for text in texts if " ".join(str(text).split()) not in words] == []
    assert shown.count("Arguments:") <= 1
    doc = inspect.getdoc(command.callback) if command.callback else None
    assert command.help or doc


def test_every_command_stands_under_a_heading_once() -> None:
    named = [name for names in SECTIONS.values() for name in names]
    assert len(named) == len(set(named))
    assert set(getattr(ROOT, "commands", {})) <= set(named)


@pytest.mark.parametrize("path", EXAMPLES)
def test_examples_are_calls_that_the_command_line_takes(path: str, call: Call) -> None:
    command = COMMANDS[tuple(path.split())]
    for line in EXAMPLES[path]:
        words = shlex.split(line)
        assert words[0] == "fedpeft"
        assert words[1 : 1 + len(path.split())] == path.split()
        command.make_context(path, words[1 + len(path.split()) :], resilient_parsing=False)
        assert line in call(*path.split(), "--help")[1]


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        (["simulat"], "'simulate'"),
        (["run", "lst"], "'list'"),
        (["plan", "--sett", "a=b"], "'--set'"),
    ],
)
def test_a_slip_is_answered_with_what_was_meant_once(typed: list[str], hint: str, call: Call) -> None:
    code, _, said = call(*typed)
    assert code == 2
    assert said.count("\n") == 1
    assert said.count("Did you mean") == 1
    assert hint in said


def test_shells_can_complete(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_FEDPEFT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "fedpeft sim")
    monkeypatch.setenv("COMP_CWORD", "1")
    code, shown, _ = call()
    assert code == 0
    assert shown.split() == ["simulate"]
