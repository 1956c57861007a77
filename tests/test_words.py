"""One name, one thing: classes, modules and functions of the product."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("fedpeft", "server/fedpeft_server", "client/fedpeft_client")
GENERATED = "fedpeft/v1/"

# Files of these names are a seam of a family; the folder says which.
SEAMS = frozenset({"__init__", "__main__", "base", "table"})

# In these folders a file has the name that people type: a command, a stage, a merging rule, a space.
NAMED_BY_USERS = ("fedpeft/commands/", "fedpeft/stages/", "fedpeft/adapters/", "fedpeft/spaces/")

# Past participles without -ed, and words that end in -ed without being one.
IRREGULAR = frozenset(
    [
        "begun",
        "bound",
        "built",
        "chosen",
        "done",
        "drawn",
        "found",
        "given",
        "gone",
        "heard",
        "held",
        "hidden",
        "kept",
        "known",
        "lost",
        "made",
        "met",
        "paid",
        "seen",
        "sent",
        "shown",
        "spent",
        "stood",
        "stored",
        "taken",
        "taught",
        "thrown",
        "told",
        "torn",
        "understood",
        "won",
        "written",
    ]
)
OTHER_WORDS = frozenset(
    ["embed", "exceed", "feed", "need", "proceed", "reseed", "seed", "shed", "speed", "succeed"]
)

# Properties that hold a state, and words of statistics.
ALLOWED = frozenset(
    {
        "closed",
        "folded",
        "started",
        "finished",
        "expected_bytes",
        "expected_cohort",
        "revoked_file",
        "squared_norm",
    }
)


def files() -> Iterator[tuple[str, ast.Module]]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if not name.startswith(GENERATED):
                yield name, ast.parse(path.read_text(encoding="utf-8"))


def is_participle(function: str) -> bool:
    first = function.strip("_").split("_")[0]
    return first in IRREGULAR or (first.endswith("ed") and len(first) > 3 and first not in OTHER_WORDS)


def members(tree: ast.Module) -> Iterator[str]:
    """Functions of a module and methods of its classes; helpers inside functions are left out."""
    for node in tree.body:
        for inner in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                yield inner.name


def test_no_two_modules_define_a_class_of_the_same_name() -> None:
    found: dict[str, set[str]] = defaultdict(set)
    for name, tree in files():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found[node.name].add(name)
    assert len(found) > 300, "the walk finds the classes"
    assert {name: sorted(where) for name, where in found.items() if len(where) > 1} == {}


def test_no_two_modules_share_a_file_name() -> None:
    found: dict[str, set[str]] = defaultdict(set)
    for name, _ in files():
        if Path(name).stem not in SEAMS and not name.startswith(NAMED_BY_USERS):
            found[Path(name).stem].add(name)
    assert {stem: sorted(where) for stem, where in found.items() if len(where) > 1} == {}


def test_functions_are_verbs() -> None:
    wrong = [
        f"{name}: {function}"
        for name, tree in files()
        for function in members(tree)
        if is_participle(function) and function not in ALLOWED
    ]
    assert wrong == []


def test_the_check_knows_a_participle() -> None:
    assert is_participle("_told")
    assert is_participle("compressed_step")
    assert not is_participle("seed_generators")
    assert not is_participle("send")
