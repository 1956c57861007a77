"""The agent and its server: first contact, restarts, homes."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from fedpeft.errors import CredentialError, FederationError, StateError
from fedpeft_client.agent import Agent
from fedpeft_client.client_settings import ClientSettings
from fedpeft_client.commands.client_command import client_status_command
from fedpeft_client.status import read_status
from fedpeft_client.transport.dialing import error_named, is_final
from fedpeft_client.workers.in_process_worker import InlineWorkshop
from fedpeft_server.transport.grpc_grid import RunIdentity
from tests.server.fleet import APP, RUN, answer, collected, fleet, messages, played, server, wait_for


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


async def agent(home: Path, address: str, name: str = "site-a", **settings: Any) -> Agent:
    made = ClientSettings(server=address, data=home, insecure=True, **settings)
    return Agent(made, name, home, None, APP, InlineWorkshop())


def test_a_server_that_never_answers_is_given_up(tmp_path: Path) -> None:
    async def live() -> None:
        await (await agent(tmp_path, f"127.0.0.1:{free_port()}", connect_s=0.3)).run()

    with pytest.raises(FederationError, match="does not answer; check the address"):
        played(live())
    status = read_status(tmp_path)
    assert status["state"] == "stopped"
    assert "does not answer" in status["last_error"]


def test_a_refusal_is_final_at_first_contact(tmp_path: Path) -> None:
    with server() as running:

        async def live() -> None:
            await (await agent(tmp_path, running.address, name="no name at all")).run()

        began = time.monotonic()
        with pytest.raises(CredentialError, match="cannot be used"):
            played(live())
        assert time.monotonic() - began < 5.0


def test_what_is_final() -> None:
    assert is_final(error_named("CredentialError: revoked"))
    assert is_final(error_named("ProtocolError: protocol version 1 came and this server speaks 3"))
    assert not is_final(error_named("StorageError: the disk is full"))
    assert isinstance(error_named("something else"), FederationError)


def test_agents_outlive_their_server(tmp_path: Path) -> None:
    port = free_port()
    with server(port=port) as first, fleet(first.address, ["site-a"], tmp_path):
        grid = first.grid(RUN)
        ids = list(grid.push_messages(messages(grid, ["site-a"], b"sleep:0.5")))
        wait_for(lambda: grid.agents_here)
        first.stop()
        with server(port=port) as second:
            again = second.grid(RUN)  # as after a restart: the run asks once more
            ids = list(again.push_messages(messages(again, ["site-a"], b"sleep:0.5")))
            assert answer(collected(again, ids)[0])["asked"] == 1


def test_one_agent_per_home(tmp_path: Path) -> None:
    async def live() -> None:
        first = await agent(tmp_path, "127.0.0.1:1")
        with pytest.raises(StateError, match="is in use by another agent"):
            await agent(tmp_path, "127.0.0.1:1")
        first.stop()
        await first.run()
        again = await agent(tmp_path, "127.0.0.1:1")
        again.stop()
        await again.run()

    played(live())


def test_status_says_what_was_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with server() as running, fleet(running.address, ["site-a"], tmp_path):
        grid = running.grid(RUN)
        for round_ in (1, 2):
            list(grid.send_and_receive(messages(grid, ["site-a"], b"hi", round_)))
        wait_for(lambda: read_status(tmp_path / "site-a")["results"] == 2)
        client_status_command(tmp_path / "site-a", "", as_json=True)
        shown = json.loads(capsys.readouterr().out)
        assert shown["running"]
        assert shown["state"] == "connected"
        assert shown["bytes_up"] > 0
    client_status_command(tmp_path / "site-a", "", as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert any("2 accepted, 0 refused, 0 failed" in line for line in lines)
    with pytest.raises(StateError, match="no agent has run"):
        read_status(tmp_path / "nowhere")


def test_a_roll_call_that_is_repeated_is_fetched_once(tmp_path: Path) -> None:
    large = bytes(200_000)  # a blob
    down = []
    with server() as running, fleet(running.address, ["site-a"], tmp_path) as agents:
        for number, round_ in enumerate((0, 0, 1, 0)):
            grid = running.grid(RunIdentity(f"run-{number}", RUN.digest))
            ids = list(grid.push_messages(messages(grid, ["site-a"], large, round_)))
            collected(grid, ids)
            down.append(agents["site-a"].status.usage.bytes_down)
    fetched = [now - before for before, now in itertools.pairwise([0, *down])]
    assert [size > len(large) for size in fetched] == [True, False, True, True]


def test_idle_agents_give_their_memory_back(tmp_path: Path) -> None:
    class Counting(InlineWorkshop):
        released = 0

        async def release(self) -> None:
            self.released += 1

    workshop = Counting()

    async def live() -> None:
        settings = ClientSettings(server="127.0.0.1:1", data=tmp_path, insecure=True, idle_release_s=0.1)
        made = Agent(settings, "site-a", tmp_path, None, APP, workshop)
        asyncio.get_running_loop().call_later(0.5, made.stop)
        await made.run()

    played(live())
    assert 2 <= workshop.released <= 5


def test_what_a_run_remembers_is_no_other_runs_that_has_its_name(tmp_path: Path) -> None:
    """Error feedback of one run in an update of another would tell of its rows outside of its promise."""
    with server() as running, fleet(running.address, ["site-a"], tmp_path):
        asked: list[Any] = []
        wait_for(lambda: running.grid(RUN).agents_here)
        for digest in ("ab" * 32, "cd" * 32, "ab" * 32):
            grid = running.grid(RunIdentity("run-1", digest))
            sent = messages(grid, ["site-a"], f"{len(asked)}".encode(), round_=len(asked) + 1, run=digest)
            (reply,) = collected(grid, list(grid.push_messages(sent)))
            asked.append(answer(reply)["asked"])
    assert asked == [1, 1, 2]
    heads = [file.read_bytes().partition(b"\n")[0] for file in (tmp_path / "site-a" / "memory").iterdir()]
    assert [json.loads(head)["run"] for head in heads] == ["run-1", "run-1"]
