"""What a federation says and writes in the course of a run: nowhere a token, or a part of a private key."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fedpeft.cli import main
from fedpeft.credentials import Identity, Material, PeerCheck, Role, read_material
from fedpeft.credentials.federation import add_member, create_federation, invite_member
from fedpeft.runtime.files import make_private_folder
from fedpeft_client.agent import Agent
from fedpeft_client.client_settings import ClientSettings
from fedpeft_client.transport.device_certificate import own_material
from fedpeft_client.workers.in_process_worker import InlineWorkshop
from fedpeft_server.runs.admin_servicer import Admin, Administration
from fedpeft_server.runs.supervisor import Supervisor
from fedpeft_server.store import Store
from fedpeft_server.transport.grpc_event_loop import get_grpc_event_loop
from fedpeft_server.transport.grpc_grid import RunIdentity
from fedpeft_server.transport.grpc_options import TransportOptions
from fedpeft_server.transport.serving import RunningServer, serve
from fedpeft_server.transport.tls import certificate_doors
from tests.server.fleet import APP, answer, messages, played, wait_for
from tests.server.in_memory_grid import standins

NOW = datetime.now(UTC)


def key_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*.pem")) if b"PRIVATE KEY" in path.read_bytes()]


def key_texts(path: Path) -> Iterator[bytes]:
    """A private key as it might be written somewhere: its PEM's lines, and its number in every usual form."""
    pem = path.read_bytes()
    yield from (line for line in pem.splitlines()[1:-1] if len(line) > 32)
    number = load_pem_private_key(pem, None).private_numbers().private_value  # type: ignore[union-attr]
    raw = number.to_bytes(32, "big")
    yield from (raw, raw.hex().encode(), base64.b64encode(raw)[:42], str(number).encode())


def test_no_output_and_no_file_holds_a_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    federation = tmp_path / "federation"
    authority = create_federation(federation, ["127.0.0.1"], NOW)
    add_member(federation, Identity("root", Role.ADMIN), NOW)
    life = timedelta(hours=1)
    tokens = [
        invite_member(federation, Identity(name, Role.AGENT), NOW, life).token for name in ("north", "south")
    ]
    said: list[str] = []
    with caplog.at_level(logging.DEBUG), Store(tmp_path / "state") as store:
        material = read_material(federation / "server", NOW)
        peers = PeerCheck(authority.certificate, authority.revoked_file)
        doors = certificate_doors(material, peers, authority, keys=federation / "server")
        running: list[RunningServer] = []
        base = Administration(
            store, Supervisor(store, standins(store, [])), doors.gate, authority, lambda: running[0]
        )
        running.append(
            serve(TransportOptions(drain_s=0.5), store.results, store.blobs, doors=doors, admin=Admin(base))
        )
        try:
            address = running[0].address
            home = make_private_folder(tmp_path / "north", holds="an agent's state")
            north = played(own_material(home / "keys", address, tokens[0]))
            with pytest.raises(Exception, match="used before"):
                played(own_material(tmp_path / "thief", address, tokens[0]))
            with pytest.raises(Exception, match="is not the one that the token is of"):
                played(own_material(tmp_path / "typo", address, tokens[1][:-3] + "AAA"))
            _worked(running[0], north, home)
            asked = ("--server", address, "--keys", str(federation / "admins" / "root"))
            for command in (
                ("server", "status", *asked),
                ("server", "status", *asked, "--json"),
                ("run", "list", *asked, "--json"),
                ("client", "status", "--home", str(home)),
                ("client", "status", "--home", str(home), "--json"),
                ("provision", str(federation)),
                ("provision", str(federation), "--json"),
            ):
                capsys.readouterr()
                with pytest.raises(SystemExit) as ended:
                    main(list(command))
                assert ended.value.code == 0
                said += capsys.readouterr()
        finally:
            running[0].stop()
    table = json.loads(said[2])
    assert table["server"]["refused"]["token"] >= 1
    (row,) = (row for row in table["agents"] if row["name"] == "north")
    assert row["refused"] == {"stored": 1}  # the run is not in the store, which refuses its result
    assert "token" in said[0]

    keys = key_files(tmp_path)
    assert len(keys) >= 4, "authority, server, an admin, an agent: or this looks for nothing"
    secrets = [token.split(".")[1].encode() for token in tokens]
    secrets += [text for path in keys for text in key_texts(path)]
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path not in keys]
    assert len(written) > 10
    outputs = {"output": "\n".join(said).encode(), "log": caplog.text.encode()}
    outputs |= {str(path): path.read_bytes() for path in written}
    assert [where for where, content in outputs.items() if any(secret in content for secret in secrets)] == []
    for path in keys:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700


def _worked(running: RunningServer, material: Material, home: Path) -> None:
    """One task, done by an agent with that certificate."""

    async def made() -> Agent:
        async def renewing() -> Material:
            return material

        settings = ClientSettings(server=running.address, data=home)
        return Agent(settings, "north", home, renewing, APP, InlineWorkshop())

    agent = played(made())
    ended = asyncio.run_coroutine_threadsafe(agent.run(), get_grpc_event_loop())
    grid = running.grid(RunIdentity("run-1", "ab" * 32))
    wait_for(lambda: "north" in grid.agents_here)
    (reply,) = grid.send_and_receive(messages(grid, ["north"], b"hi"), timeout=20.0)
    assert reply.has_error() or answer(reply)
    get_grpc_event_loop().call_soon_threadsafe(agent.stop)
    ended.result(20)
