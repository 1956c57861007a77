"""One tiny finished run that the commands are tried on, and a way to call the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands.calling import TINY, Call, exit_code, overrides


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
