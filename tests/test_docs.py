"""What the documents quote exists: files, make targets, and commands with their options."""

from __future__ import annotations

import functools
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

from fedpeft.cli import app
from fedpeft.config.deployment import find_ignored_keys
from fedpeft.config.run_file import build_run
from fedpeft_server.runs.agent_wait import agents_wanted
from fedpeft_server.store import Rules

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))),
)
FENCE = re.compile(r"^```([a-z]*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
EXAMPLES = {"server.toml": "server/server.toml", "client.toml": "client/client.toml"}  # files of that name
WRITTEN_BY_A_RUN = ("runs/", ".venv/")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def spans(text: str) -> list[str]:
    """Inline code outside of fenced blocks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def shell_lines(text: str) -> Iterator[str]:
    """Lines of shell blocks, continued lines joined, and inline code."""
    for language, block in FENCE.findall(text):
        if language in ("", "sh", "bash", "console"):
            yield from block.replace("\\\n", " ").splitlines()
    yield from spans(text)


def commands(text: str, program: str) -> list[list[str]]:
    """The arguments of every quoted call of `program`."""
    found = []
    for line in shell_lines(text):
        for part in re.split(r"&&|\|\||[|;]", line.strip().removeprefix("$ ")):
            try:
                words = shlex.split(part, comments=True)
            except ValueError:
                continue  # prose in an unlabelled block
            while words and "=" in words[0]:  # VARIABLE=value in front
                words.pop(0)
            if words and Path(words[0]).name == program and words[1:]:
                found.append(words[1:])
    return found


def paths(text: str, folder: str = "") -> list[str]:
    """Relative links of a document in `folder`, and code that looks like a path of this repository."""
    roots = {entry.name for entry in ROOT.iterdir() if not entry.name.startswith(".")} | {".ci"}
    links = [folder + link.split("#")[0] for link in LINK.findall(text) if not re.match(r"[a-z]+:|#", link)]
    words = [re.sub(r"\$\w+", "*", word) for line in shell_lines(text) for word in line.split()]
    quoted = [word for word in words if "/" in word and word.split("/")[0] in roots and "://" not in word]
    plain = [
        span for span in spans(text) if re.fullmatch(r"[A-Z_]*[a-z][A-Za-z_.-]*\.(md|toml|yml|lock)", span)
    ]
    plain = [EXAMPLES.get(span, span) for span in plain]
    return [path for path in links + quoted + plain if not path.startswith(WRITTEN_BY_A_RUN)]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_exist(name: str) -> None:
    folder = name.rpartition("/")[0]
    found = paths(text_of(name), f"{folder}/" if folder else "")
    missing = [path for path in found if not list(ROOT.glob(path.rstrip("/.,:")))]
    assert missing == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_make_targets_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
    asked = [word for words in commands(text_of(name), "make") for word in words if "=" not in word]
    assert [word for word in asked if word not in targets] == []


command_line = functools.cache(typer.main.get_command)


def unknown_parts(words: list[str]) -> list[str]:
    """What of a quoted ``fedpeft ...`` the command line does not know."""
    group = command_line(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    known: dict[str, click.Command] = group.commands
    if words[0].startswith("-"):
        command: click.Command = group
    elif words[0] in known:
        command = known[words[0]]
    else:
        return [words[0]]
    while isinstance(nested := getattr(command, "commands", None), dict) and words[1:] and words[1] in nested:
        command, words = nested[words[1]], words[1:]
    options = {"--help"} | {
        option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
    }
    return [word for word in words if word.startswith("-") and word.split("=")[0] not in options]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_exist(name: str) -> None:
    wrong = {" ".join(words): unknown_parts(words) for words in commands(text_of(name), "fedpeft")}
    assert {call: parts for call, parts in wrong.items() if parts} == {}


def test_the_readme_names_the_two_commands() -> None:
    quoted = [" ".join(words) for words in commands(text_of("README.md"), "make")]
    assert {"demo", "test"} <= set(quoted)


def test_the_readmes_run_begins_with_the_readmes_agents() -> None:
    """The second example as written: its run file, and the agents that its certificates are for."""
    text = text_of("README.md")
    (tables,) = [tomllib.loads(block) for language, block in FENCE.findall(text) if language == "toml"]
    (submit,) = [words for words in commands(text, "fedpeft") if words[:2] == ["run", "submit"]]
    (provision,) = [words for words in commands(text, "fedpeft") if words[0] == "provision"]
    agents = provision.count("--agent")
    run = build_run(tables, source="README.md")
    rules = Rules(min_agents=int(submit[submit.index("--min-agents") + 1]))
    assert agents_wanted(run, rules) == agents == 2
    assert set(find_ignored_keys(run)) == {"data.train", "data.partitioner", "evaluation.baselines"}


def test_the_readers_find_what_they_look_for() -> None:
    """The other tests would pass on documents that they cannot read."""
    text = "See [x](no/such) and `nothere.md`:\n```sh\nA=1 make nope && fedpeft simulate --nope a.toml\n```\n"
    assert paths(text) == ["no/such", "nothere.md"]
    assert commands(text, "make") == [["nope"]]
    assert unknown_parts(commands(text, "fedpeft")[0]) == ["--nope"]
    assert unknown_parts(["nope"]) == ["nope"]
    assert unknown_parts(["simulate", "--resume", "runs/demo"]) == []


def test_help_lists_every_public_target() -> None:
    makefile = text_of("Makefile")
    public = set(re.findall(r"^([a-z-]+):.*  ## ", makefile, re.MULTILINE))
    expected = "help setup check test test-fast federation soak fuzz exhaustive protos demo bench lock clean"
    assert public == {*expected.split(), "test-portable", "reference", "docs"}
