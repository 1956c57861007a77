"""A command and its terminal: encodings, output with no room left, Ctrl-C once, twice and at any moment."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedpeft.ledger.run_place import holds_run
from tests.commands.calling import TINY, overrides

FEDPEFT = [sys.executable, "-m", "fedpeft"]


def started(*words: str, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, **options.pop("env", {})}
    return subprocess.Popen(
        [*FEDPEFT, *words],
        env=environment,
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        **options,
    )


def ended(*words: str, **options: Any) -> tuple[int, str, str]:
    process = started(*words, **options)
    out, err = process.communicate(timeout=300)
    return process.returncode, out or "", err


def simulating(out: Path, *more: str) -> list[str]:
    return ["simulate", "--out", str(out), "--workers", "1", *overrides(*TINY), *more]


def test_a_run_ends_well_where_its_signs_cannot_be_shown(tmp_path: Path) -> None:
    code, out, err = ended(*simulating(tmp_path / "run"), env={"PYTHONIOENCODING": "ascii", "LANG": "C"})
    assert code == 0, err
    assert "Traceback" not in err
    assert out.isascii()
    assert "?" in out  # in the place of a sign


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
@pytest.mark.parametrize("words", [["methods"], ["plan", "--json", *overrides(*TINY)], ["--help"]])
def test_output_on_a_full_disk_is_one_line(words: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        code, _, err = ended(*words, stdout=full)
    assert code == 11
    assert err.startswith("error: the output cannot be read or written (No space left")
    assert err.count("\n") == 1


def test_a_reader_that_goes_away_ends_a_command_without_a_word() -> None:
    process = started("methods")
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=60) != 0
    assert process.stderr is not None
    with process.stderr:
        assert "Traceback" not in process.stderr.read()


def interrupted(words: list[str], times: list[Callable[[], bool]], cwd: Path) -> tuple[int, str]:
    """Exit code and stderr of a command that gets Ctrl-C at each of these moments."""
    process = started(*words, cwd=cwd, start_new_session=True)
    deadline = time.monotonic() + 120
    for reached in times:
        while process.poll() is None and not reached():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, err


def after(seconds: float) -> Callable[[], bool]:
    """Whether so many seconds are over since now."""
    moment = time.monotonic() + seconds
    return lambda: time.monotonic() >= moment


@pytest.fixture
def long_run(tmp_path: Path) -> list[str]:
    """A run that nobody waits for."""
    tables = {
        "run": {"name": "long", "rounds": 500},
        "data": {"limit": 32, "partitioner": {"kind": "iid", "clients": 2}},
    }
    (tmp_path / "long.toml").write_text(tomli_w.dumps(tables))
    return ["simulate", "long.toml", "--out", "a run", "--workers", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("pauses", [(0.02,), pytest.param((0.0, 0.1), marks=pytest.mark.exhaustive)])
def test_ctrl_c_names_the_run_and_a_second_one_ends_at_once(
    pauses: tuple[float, ...], long_run: list[str], tmp_path: Path
) -> None:
    def round_done() -> bool:
        return (tmp_path / "a run" / "checkpoints" / "round-000001.safetensors").exists()

    code, err = interrupted(long_run, [round_done], tmp_path)
    assert code == 130
    assert (
        err.strip().splitlines()[-1] == "interrupted; the run goes on with: fedpeft simulate --resume 'a run'"
    )
    assert "Traceback" not in err
    resume = ["simulate", "--resume", "a run", "--workers", "2"]
    for pause in pauses:
        code, err = interrupted(resume, [after(10.0), after(10.0 + pause)], tmp_path)
        assert code in (130, -signal.SIGINT)
        assert "Traceback" not in err
        if code == 130:
            assert "interrupted" in err


@pytest.mark.slow
def test_ctrl_c_at_any_moment_is_clean(long_run: list[str], tmp_path: Path) -> None:
    jitter = random.Random(0)
    for number in range(6):
        pause = jitter.random() * (0.3 if number < 2 else 6.0)
        code, err = interrupted(long_run, [after(pause)], tmp_path)
        assert code in (130, -signal.SIGINT), err
        assert "Traceback" not in err, err
        if "--resume" in err:
            assert holds_run(tmp_path / "a run")
        long_run = [*long_run[:6], "--force"] if holds_run(tmp_path / "a run") else long_run[:6]
