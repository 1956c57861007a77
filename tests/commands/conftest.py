"""One tiny finished run that the commands are tried on, and a way to call the command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedpeft.cli import main

TINY = (
    "run.rounds=1",
    "data.limit=32",
    "data.test_limit=8",
    "data.partitioner.clients=2",
    "training.steps=1",
    "evaluation.baselines=false",
)

Call = Callable[..., tuple[int, str, str]]


def overrides(*items: str) -> list[str]:
    """`--set` for each item."""
    return [part for item in items for part in ("--set", item)]


def exit_code(arguments: Sequence[str]) -> int:
    """What the command line ends with."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Call the command line in this process: exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = exit_code(arguments)
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run: two clients, one round, one step."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    arguments = ["simulate", "--out", str(folder), "--workers", "1", "--quiet", *overrides(*TINY)]
    assert exit_code(arguments) == 0
    return folder


@pytest.fixture(scope="session")
def tiny_rows(tiny_run: Path) -> list[dict[str, Any]]:
    """The rows that the run left."""
    return [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
