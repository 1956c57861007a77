"""`fedpeft server` as a process: what it refuses to start with, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedpeft.cli import main
from fedpeft.errors import UsageError
from fedpeft_server.ops.server_settings import read_settings
from fedpeft_server.store import Store

ROOT = Path(__file__).resolve().parents[2]


def refused(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """The one line that `fedpeft server` ends with at once."""
    capsys.readouterr()
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with pytest.raises(SystemExit) as ended:
            main(["server", *arguments])
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    line = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == code, line
    return line


def local(tmp_path: Path, port: int = 0) -> tuple[str, ...]:
    return ("--insecure", "--listen", f"127.0.0.1:{port}", "--state", str(tmp_path / "state"))


def test_a_port_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        line = refused(capsys, 9, *local(tmp_path, taken.getsockname()[1]))
    assert "cannot be listened on" in line
    with Store(tmp_path / "state") as store:
        assert store.runs.list() == []


def test_a_database_of_another_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Store(tmp_path / "state"):
        pass
    connection = sqlite3.connect(tmp_path / "state" / "state.db")
    connection.execute("UPDATE schema_version SET version = 0")
    connection.commit()
    connection.close()
    assert "fedpeft server --migrate" in refused(capsys, 7, *local(tmp_path))


def test_a_state_that_another_server_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Store(tmp_path / "state"):
        assert "in use by another fedpeft server" in refused(capsys, 7, *local(tmp_path))


def test_a_state_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "state").write_text("a file")
    assert "File exists" in refused(capsys, 11, *local(tmp_path))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "--keys DIR"),
        ({"insecure": True, "listen": "0.0.0.0:9440"}, "would be plaintext"),
        ({"insecure": True, "tls": {"keys": "x"}}, "either --keys"),
        ({"insecure": True, "listen": "nonsense"}, "HOST:PORT"),
        ({"insecure": True, "listen": "127.0.0.1:99999"}, "HOST:PORT"),
        ({"insecure": True, "parallel_runs": 0}, "parallel_runs: Input should be greater"),
    ],
)
def test_settings_that_cannot_be(given: Mapping[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        read_settings(None, given)


def test_a_settings_file_with_every_problem_at_once_and_options_over_it(tmp_path: Path) -> None:
    config = tmp_path / "server.toml"
    config.write_text(
        'listen = "127.0.0.1:1234"\nsurprise = 1\n[limits]\nagents = 0\n[log]\nformat = "xml"\n'
    )
    with pytest.raises(UsageError) as caught:
        read_settings(config, {})
    for part in ("surprise: unknown key", "limits.agents", "log.format"):
        assert part in str(caught.value)
    config.write_text('state = "here"\ninsecure = true\n[limits]\nagents = 7\n')
    settings = read_settings(config, {"listen": "127.0.0.1:9", "tls": {"keys": None}})
    assert (settings.state, settings.transport().max_sessions) == (tmp_path / "here", 7)
    assert (settings.transport().host, settings.transport().port) == ("127.0.0.1", 9)
    config.write_text("listen = [")
    with pytest.raises(UsageError, match="cannot be read as TOML"):
        read_settings(config, {})


def test_the_example_settings_can_be_used() -> None:
    settings = read_settings(ROOT / "server" / "server.toml", {})
    assert settings.tls.keys is not None


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_politely(number: int, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "fedpeft.cli", "server", *local(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / f) for f in (".", "server", "client"))},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    deadline = time.monotonic() + 120
    while "listening on" not in process.stderr.readline():
        assert process.poll() is None
        assert time.monotonic() < deadline
    process.send_signal(number)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 0, log
    assert "Traceback" not in log
