"""One server writes to a database: whoever lost it, while it was away for instance, writes nothing more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from fedpeft.config.run_file import build_run
from fedpeft.errors import StateError
from fedpeft_server.store import Rules, RunStatus, Store
from fedpeft_server.store.database import Database, TakenOverError
from tests.server.postgres import Cluster

ROOT = Path(__file__).resolve().parents[3]
RUN = build_run({"run": {"name": "tiny", "rounds": 3}}, source="test")


def submit(store: Store, name: str) -> str:
    return store.runs.submit(RUN, Rules(), submission=name, submitter="me").id


def check_that_only_the_second_writes(first: Store, second: Store) -> None:
    """The first one's calls fail with the reason, as do its processes', and nothing of them is there."""
    theirs = submit(second, "two")
    for write in (
        lambda: submit(first, "three"),
        lambda: first.runs.set_status(theirs, RunStatus.FAILED, "by the first"),
        lambda: first.agents.record_seen(["north"]),
        lambda: first.rounds(first.runs.get(theirs)).commit_spent("{}"),
    ):
        with pytest.raises(TakenOverError, match="taken over by another fedpeft server"):
            write()
    with (
        closing(Database(first.reference.url, epoch=first.reference.epoch)) as process,
        pytest.raises(TakenOverError),
        process.writing(),
    ):
        raise AssertionError("a process of the first one could write")
    with pytest.raises(TakenOverError):
        first.database.watch()
    assert "taken over by another fedpeft server" in first.database.reason_of_loss
    second.database.watch()
    assert second.database.reason_of_loss == ""
    assert [run.status for run in second.runs.list() if run.id == theirs] == [RunStatus.QUEUED]
    assert len(second.runs.list()) == 2
    assert second.agents.list() == []


def test_two_folders_on_one_sqlite_file(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    with Store(tmp_path / "one", url=url) as first:
        submit(first, "one")
        with Store(tmp_path / "two", url=url) as second:
            check_that_only_the_second_writes(first, second)


@pytest.mark.slow
def test_a_second_server_that_comes_while_postgresql_was_away(tmp_path: Path, cluster: Cluster) -> None:
    url = cluster.url("fenced")
    with Store(tmp_path / "one", url=url) as first:
        submit(first, "one")
        cluster.stop("immediate")
        cluster.start()
        with Store(tmp_path / "two", url=url) as second:
            check_that_only_the_second_writes(first, second)


@pytest.mark.slow
def test_a_server_locks_the_database_again_after_its_restart(tmp_path: Path, cluster: Cluster) -> None:
    url = cluster.url("again")
    with Store(tmp_path / "one", url=url) as first:
        cluster.stop("immediate")
        cluster.start()
        first.database.watch()
        with pytest.raises(StateError, match="in use by another fedpeft server"):
            Store(tmp_path / "two", url=url)
        assert submit(first, "one") == "tiny-1"


def daemon(folder: Path, url: str) -> tuple[subprocess.Popen[str], Path]:
    """A server, and where its log is."""
    log = folder.with_suffix(".log")
    words = ("--insecure", "--listen", "127.0.0.1:0", "--state", str(folder), "--database", url)
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "server", "client"))
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "fedpeft.cli", "server", *words],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": paths},
            stderr=file,
            text=True,
        )
    return process, log


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[str], log: Path) -> None:
    deadline = time.monotonic() + 180
    while not is_so():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


@pytest.mark.slow
def test_a_daemon_that_lost_its_database_ends_with_the_reason(tmp_path: Path, cluster: Cluster) -> None:
    """It stood still while the database was started again and another one took it."""
    url = cluster.url("daemons")
    first, its_log = daemon(tmp_path / "one", url)
    second = None
    try:
        wait_until(lambda: "listening on" in its_log.read_text(), first, its_log)
        first.send_signal(signal.SIGSTOP)
        cluster.stop("immediate")
        cluster.start()
        second, log = daemon(tmp_path / "two", url)
        wait_until(lambda: "listening on" in log.read_text(), second, log)
        first.send_signal(signal.SIGCONT)
        assert first.wait(120) == 7, its_log.read_text()
        said = its_log.read_text()
        assert "was taken over by another fedpeft server" in said.splitlines()[-1]
        assert "Traceback" not in said
        assert second.poll() is None
    finally:
        for process in filter(None, (first, second)):
            process.kill()
            process.wait()
