"""What a worker cannot do once it is confined, tried from inside of one."""

from __future__ import annotations

import asyncio
import ctypes.util
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from fedpeft.errors import PolicyError
from fedpeft.runtime.frames import Frame
from fedpeft.transport.record_bytes import content_bytes, content_of
from fedpeft.transport.tasks import TRAIN, Task, task_content
from fedpeft.wire.failures import from_record
from fedpeft_client.workers.confinement import landlock_version
from fedpeft_client.workers.worker_process import Bounds, WorkerPlace, WorkerProcess

APP = "tests.client.confined_app:app"
VERSION = landlock_version() if sys.platform == "linux" else 0
FILTERS = sys.platform == "linux" and bool(ctypes.util.find_library("seccomp"))
needs_landlock = pytest.mark.skipif(not VERSION, reason="NOT TESTED: this kernel has no Landlock")
needs_filter = pytest.mark.skipif(not FILTERS, reason="NOT TESTED: libseccomp is not installed")
needs_tcp = pytest.mark.skipif(
    VERSION < 4 and not FILTERS, reason="NOT TESTED: neither Landlock 4 nor libseccomp is here"
)


@pytest.fixture
def place(tmp_path: Path) -> WorkerPlace:
    for name in ("home/keys", "rows", "model", "secret"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("home/keys/agent.key", "home/usage.json", "rows/a.jsonl", "model/config.json", "secret/x"):
        (tmp_path / name).write_text("x")
    (tmp_path / "model" / "weights").symlink_to(tmp_path / "secret" / "x")
    return WorkerPlace(tmp_path / "home", tmp_path / "rows", str(tmp_path / "model"))


def tried(place: WorkerPlace | None, tries: dict[str, str], **workers: Any) -> dict[str, Any]:
    """What came of these, in a worker of its own."""
    answer = answered(place, tries, **workers)
    assert not answer.header["error"], answer.header["error"]
    return dict(content_of(answer.parts["content"], who="worker").config_records["update"])


def answered(place: WorkerPlace | None, tries: dict[str, str], **workers: Any) -> Frame:
    """The answer of a worker of its own to an order to try these."""
    task = Task("d", 1, json.dumps(tries).encode())
    header = {"app": APP, "kind": TRAIN, "group": "1", "run_digest": "", "device_task": ""}
    more = {"client": "site-a", "data": "", "model": "", "base_digests": []}
    order = Frame({**header, **more}, {"content": content_bytes(task_content(task)), "memory": b""})

    async def live() -> Frame:
        workshop = WorkerProcess(Bounds(), place=place, **workers)
        try:
            return await workshop.do(order)
        finally:
            await workshop.close()

    return asyncio.run(asyncio.wait_for(live(), 60))


@needs_landlock
def test_a_worker_reads_its_rows_and_its_model_and_nothing_of_the_owners(
    place: WorkerPlace, tmp_path: Path
) -> None:
    refused = {
        "read/a key": str(place.home / "keys" / "agent.key"),
        "read/usage": str(place.home / "usage.json"),
        "read/elsewhere": str(tmp_path / "secret" / "other"),
        "read on a thread": str(place.home / "keys" / "agent.key"),
        "read by a program": str(place.home / "keys" / "agent.key"),
        "list/the folder above": str(tmp_path),
        "write/rows": str(tmp_path / "rows" / "a.jsonl"),
        "append/usage": str(place.home / "usage.json"),
        "write/a module": str(Path(__file__).with_name("made.py")),
        "write/home": str(place.home / "new"),
    }
    allowed = {
        "read/rows": str(tmp_path / "rows" / "a.jsonl"),
        "read/model": str(tmp_path / "model" / "config.json"),
        "read/what the model links to": str(tmp_path / "model" / "weights"),
        "write/scratch": str(place.home / "scratch" / "x"),
        "write/starts": str(place.home / "starts" / "x"),
    }
    (tmp_path / "secret" / "other").write_text("x")
    came = tried(place, refused | allowed)
    assert {what: came[what] for what in allowed} == dict.fromkeys(allowed, "done")
    assert not [what for what in refused if came[what] == "done"]
    free = tried(None, refused)
    Path(__file__).with_name("made.py").unlink()
    assert set(free.values()) == {"done"}, "what is refused is there, and a worker alone can have it"


@needs_tcp
def test_a_worker_opens_no_connection(place: WorkerPlace) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        target = f"127.0.0.1:{listening.getsockname()[1]}"
        assert tried(place, {"dial": target, "listen": ""}) == {
            "dial": "PermissionError",
            "listen": "PermissionError",
        }
        assert tried(None, {"dial": target, "listen": ""}) == {"dial": "done", "listen": "done"}
        assert tried(place, {"dial": target}, download=True) == {"dial": "done"}, "where the owner says so"


@needs_filter
def test_a_worker_has_no_socket_of_any_kind(place: WorkerPlace, tmp_path: Path) -> None:
    """An agent for keys, or a daemon that starts containers, would do what the worker cannot."""
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        assert set(tried(place, {"udp": "", "unix": path}).values()) == {"PermissionError"}
        assert set(tried(None, {"udp": "", "unix": path}).values()) == {"done"}


@needs_landlock
def test_a_worker_does_not_touch_the_agent(place: WorkerPlace) -> None:
    came = tried(
        place, {"memory": str(os.getpid()), **({"signal": str(os.getpid())} if VERSION >= 6 else {})}
    )
    assert "done" not in came.values()


@needs_landlock
@needs_filter
def test_an_owner_who_asks_for_confinement_gets_it(place: WorkerPlace, tmp_path: Path) -> None:
    answer = answered(place, {"read/rows": str(tmp_path / "rows" / "a.jsonl")}, needs_confinement=True)
    assert not answer.header["error"]


def test_a_worker_that_is_not_confined_does_no_task_of_an_owner_who_asks_for_that(
    place: WorkerPlace, tmp_path: Path
) -> None:
    """Whatever is missing: here the rows lie in a folder above the agent's keys, which so stay readable."""
    above = WorkerPlace(place.home, tmp_path)
    order = {"write/mark": str(tmp_path / "home" / "starts" / "mark")}
    refused = from_record(answered(above, order, needs_confinement=True).header["error"])
    assert isinstance(refused, PolicyError)
    assert refused.limits == {"needs_confinement": None}
    assert not VERSION or f"files: {place.home} can be listed" in str(refused)
    assert not (tmp_path / "home" / "starts" / "mark").exists()
    assert not answered(above, order).header["error"], "and another owner's works"


SECRETS = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "FEDPEFT_TOKEN", "https_proxy", "GITHUB_TOKEN")


def test_secrets_of_the_environment_do_not_reach_a_worker(
    place: WorkerPlace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not as variables, not in the agent's own environment, and not the token beside the hub's models."""
    for name in SECRETS:
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "hf" / "hub").mkdir(parents=True)
    (tmp_path / "hf" / "token").write_text("secret")
    (tmp_path / "hf" / "hub" / "model").write_text("x")
    tries = {f"variable/{name}": name for name in SECRETS}
    came = tried(
        place, tries | {"variable/path": "PATH", "read/model": str(tmp_path / "hf" / "hub" / "model")}
    )
    assert {what: came[what] for what in tries} == dict.fromkeys(tries, "KeyError")
    assert came["variable/path"] == came["read/model"] == "done"
    if VERSION:
        hidden = {"read/agent": f"/proc/{os.getpid()}/environ", "read/token": str(tmp_path / "hf" / "token")}
        assert set(tried(place, hidden).items()) == {(what, "PermissionError") for what in hidden}


def test_a_worker_gets_the_variables_that_its_owner_names(
    place: WorkerPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, "secret")
    tries = {f"variable/{name}": name for name in SECRETS}
    came = tried(place, tries, variables=("HF_TOKEN",))
    assert [what for what, outcome in came.items() if outcome == "done"] == ["variable/HF_TOKEN"]
