"""With certificates: enrolment by token, names by certificate, signed results, revocation."""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedpeft.credentials import (
    Authority,
    Identity,
    Material,
    PeerCheck,
    Role,
    create_authority,
    new_key,
    read_material,
)
from fedpeft.credentials.certificates import parse_certificate
from fedpeft.credentials.federation import create_federation, renew_server
from fedpeft.errors import CredentialError, FederationError, FedPEFTError, UpdateError
from fedpeft.v1 import federation_pb2 as pb
from fedpeft_client.agent import Agent
from fedpeft_client.client_settings import ClientSettings
from fedpeft_client.transport.device_certificate import own_material, renew_if_due
from fedpeft_client.transport.dialing import error_of, open_channel
from fedpeft_client.transport.session import Session
from fedpeft_client.workers.in_process_worker import InlineWorkshop
from fedpeft_server.store.contracts import ReceivedResult
from fedpeft_server.store.memory_store import MemoryAcceptor, MemoryBlobs
from fedpeft_server.transport.callers import Caller, CertificateGate
from fedpeft_server.transport.grpc_options import TransportOptions
from fedpeft_server.transport.serving import RunningServer, serve
from fedpeft_server.transport.tls import certificate_doors
from tests.server.fleet import APP, RUN, answer, messages, played, wait_for


@dataclass
class House:
    authority: Authority
    running: RunningServer
    acceptor: MemoryAcceptor

    def device(self, name: str, role: Role = Role.AGENT) -> Material:
        key = new_key()
        issued = self.authority.device(key.public_key(), Identity(name, role), datetime.now(UTC))
        return Material(key, parse_certificate(issued, "test"), self.authority.certificate)


@contextmanager
def house(folder: Path, ahead: timedelta = timedelta(0)) -> Iterator[House]:
    """A server; `ahead` of this machine's clock."""
    now = datetime.now(UTC) + ahead
    authority = create_authority(folder, now)
    key = new_key()
    shown = parse_certificate(authority.server(key.public_key(), ["127.0.0.1", "localhost"], now), "test")
    peers = PeerCheck(authority.certificate, authority.revoked_file)
    acceptor = MemoryAcceptor()
    running = serve(
        TransportOptions(drain_s=0.5),
        acceptor,
        MemoryBlobs(),
        doors=certificate_doors(Material(key, shown, authority.certificate), peers, authority),
    )
    try:
        yield House(authority, running, acceptor)
    finally:
        running.stop()


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house(tmp_path_factory.mktemp("ca")) as made:
        yield made


async def greeted(address: str, material: Material | None, name: str) -> str:
    """What the server calls an agent."""
    try:
        async with open_channel(address, material) as channel:
            link = await Session.open(channel, name, {})
            link.close()
            return link.welcome.name
    except grpc.aio.AioRpcError as error:
        raise error_of(error, address) from error


def test_the_certificate_says_who_it_is(ours: House) -> None:
    material = ours.device("hospital-1")
    assert played(greeted(ours.running.address, material, "")) == "hospital-1"
    with pytest.raises(CredentialError, match="its certificate"):
        played(greeted(ours.running.address, material, "hospital-2"))


def test_others_do_not_come_in(ours: House, tmp_path: Path) -> None:
    with pytest.raises(FederationError):
        played(greeted(ours.running.address, None, "hospital-1"))
    with pytest.raises(CredentialError, match="this needs agent"):
        played(greeted(ours.running.address, ours.device("boss", Role.ADMIN), ""))
    strangers = create_authority(tmp_path / "other-ca", datetime.now(UTC))
    key = new_key()
    issued = strangers.device(key.public_key(), Identity("hospital-1", Role.AGENT), datetime.now(UTC))
    foreign = Material(key, parse_certificate(issued, "test"), ours.authority.certificate)
    with pytest.raises(FedPEFTError):
        played(greeted(ours.running.address, foreign, ""))


def test_a_revoked_device_is_refused(ours: House) -> None:
    material = ours.device("lost-laptop")
    assert played(greeted(ours.running.address, material, "")) == "lost-laptop"
    ours.authority.revoke("lost-laptop", datetime.now(UTC))
    with pytest.raises(CredentialError, match="revoked"):
        played(greeted(ours.running.address, material, ""))


def test_a_token_becomes_a_certificate_once(ours: House, tmp_path: Path) -> None:
    token = ours.authority.tokens.invite(
        Identity("hospital-7", Role.AGENT), datetime.now(UTC), timedelta(hours=1)
    )
    keys = tmp_path / "keys"
    material = played(own_material(keys, ours.running.address, token))
    assert played(greeted(ours.running.address, material, "")) == "hospital-7"
    assert (keys / "key.pem").stat().st_mode & 0o777 == 0o600
    again = played(own_material(keys, ours.running.address, ""))
    assert again.certificate == material.certificate, "later starts need no token"
    assert played(renew_if_due(keys, ours.running.address)).certificate == material.certificate
    with pytest.raises(CredentialError):
        played(own_material(tmp_path / "thief", ours.running.address, token))
    with pytest.raises(CredentialError, match="give the token"):
        played(own_material(tmp_path / "nobody", ours.running.address, ""))


def test_results_are_signed_and_refused_if_anything_differs(ours: House, tmp_path: Path) -> None:
    material = ours.device("hospital-3")

    async def renewing() -> Material:
        return material

    async def agent() -> Agent:
        settings = ClientSettings(server=ours.running.address, data=tmp_path)
        return Agent(settings, "hospital-3", tmp_path / "home", renewing, APP, InlineWorkshop())

    made = played(agent())
    import asyncio

    from fedpeft_server.transport.grpc_event_loop import get_grpc_event_loop

    running = asyncio.run_coroutine_threadsafe(made.run(), get_grpc_event_loop())
    grid = ours.running.grid(RUN)
    wait_for(lambda: "hospital-3" in grid.agents_here)
    (reply,) = grid.send_and_receive(messages(grid, ["hospital-3"], b"hi", 4))
    assert answer(reply)["payload"] == b"hi"
    get_grpc_event_loop().call_soon_threadsafe(made.stop)
    running.result(10)

    (arrival,) = ours.acceptor.recall(RUN.id, 4, "train")
    assert arrival.signature
    gate = CertificateGate(PeerCheck(ours.authority.certificate, ours.authority.revoked_file))
    caller = Caller("hospital-3", material.certificate_pem)
    gate.verify(caller, arrival)
    changes: dict[str, Any] = {
        "run": "run-2",
        "run_digest": "cd" * 32,
        "round": 5,
        "agent": "hospital-1",
        "digest": "00" * 32,
        "size": arrival.size + 1,
        "signature": arrival.signature[:-1] + bytes([arrival.signature[-1] ^ 1]),
    }
    for name, value in changes.items():
        forged = ReceivedResult(**{**vars(arrival), name: value})
        with pytest.raises(UpdateError):
            gate.verify(caller, forged)
    with pytest.raises(UpdateError):
        gate.verify(Caller("hospital-4", ours.device("hospital-4").certificate_pem), arrival)
    assert json.loads((tmp_path / "home" / "status.json").read_text())["results"] == 1


def test_an_open_session_of_a_revoked_device_gets_no_more_tasks(ours: House) -> None:
    material = ours.device("stolen-laptop")
    grid = ours.running.grid(RUN)

    rounds: list[int] = []

    async def waited() -> None:
        async with open_channel(ours.running.address, material) as channel:
            link = await Session.open(channel, "", {})
            try:
                grid.push_messages(messages(grid, ["stolen-laptop"], b"before", 1))
                async for message in link.messages():
                    if message.WhichOneof("message") == "task":
                        rounds.append(message.task.round)
                        # As `fedpeft provision --revoke` does it: in the authority's folder, not by a call.
                        ours.authority.revoke("stolen-laptop", datetime.now(UTC))
                        grid.push_messages(messages(grid, ["stolen-laptop"], b"after", 2))
            finally:
                link.close()

    with pytest.raises(grpc.aio.AioRpcError, match="was revoked"):
        played(waited())
    assert rounds == [1]


def test_a_heartbeat_of_a_revoked_device_ends_its_session(ours: House) -> None:
    material = ours.device("quiet-laptop")

    async def beaten() -> None:
        async with open_channel(ours.running.address, material) as channel:
            link = await Session.open(channel, "", {})
            try:
                ours.authority.revoke("quiet-laptop", datetime.now(UTC))
                await link.send(pb.AgentMessage(heartbeat=pb.Heartbeat()))
                async for _ in link.messages():
                    pass
            finally:
                link.close()

    with pytest.raises(grpc.aio.AioRpcError, match="was revoked"):
        played(beaten())


def test_a_token_that_nobody_waits_for_is_named(tmp_path: Path) -> None:
    """The server ends the handshake without a word; that it is there tells why."""
    with house(tmp_path / "ca") as made:
        now = datetime.now(UTC)
        token = made.authority.tokens.invite(Identity("late", Role.AGENT), now, timedelta(hours=1))
        made.authority.revoke("late", now)
        with pytest.raises(CredentialError, match="no token waits there"):
            played(own_material(tmp_path / "keys", made.running.address, token))
        address = made.running.address
    with pytest.raises(FederationError, match="does not answer"):
        played(own_material(tmp_path / "keys", address, token))


def test_a_renewed_server_key_is_shown_without_a_restart(tmp_path: Path) -> None:
    created = create_federation(tmp_path / "federation", ["127.0.0.1"], datetime.now(UTC))
    keys = tmp_path / "federation" / "server"
    material = read_material(keys, datetime.now(UTC))
    peers = PeerCheck(created.certificate, created.revoked_file)
    doors = certificate_doors(material, peers, created, keys=keys)
    running = serve(TransportOptions(drain_s=0.5), MemoryAcceptor(), MemoryBlobs(), doors=doors)
    shown: Callable[[], str] = lambda: ssl.get_server_certificate(("127.0.0.1", running.port))  # noqa: E731
    try:
        first = shown()
        renew_server(tmp_path / "federation", [], datetime.now(UTC))
        wait_for(lambda: shown() != first)
        assert shown().encode() == read_material(keys, datetime.now(UTC)).certificate_pem
        (keys / "certificate.pem").write_text("half of one")
        renewed_once = shown()
        assert renewed_once != first, "what cannot be used is not used"
    finally:
        running.stop()
