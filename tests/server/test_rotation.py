"""Certificates are renewed before they end, for devices and for people; both ends say so where that fails."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedpeft.credentials import Identity, Material, Role, make_request, new_key, read_material, write_material
from fedpeft.credentials.certificates import parse_certificate
from fedpeft.errors import CredentialError, FedPEFTError
from fedpeft.v1 import federation_pb2 as pb
from fedpeft.wire.protocol import NEWEST_PROTOCOL
from fedpeft_client.transport.admin_client import AdminClient
from fedpeft_client.transport.device_certificate import renew_if_due
from fedpeft_client.transport.dialing import error_of, open_channel
from fedpeft_server.ops.expiry import ExpiryWatch
from fedpeft_server.transport.sessions import AgentStatus, ServerStatus
from tests.server.fleet import federation, played
from tests.server.test_doors import House, house

DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house(tmp_path_factory.mktemp("ca")) as made:
        yield made


def aged(ours: House, folder: Path, name: str, days: int, role: Role = Role.AGENT) -> Material:
    """A folder whose certificate was issued so many days ago; it ends after 365."""
    key, then = new_key(), datetime.now(UTC) - days * DAY
    issued = ours.authority.device(key.public_key(), Identity(name, role), then)
    material = Material(key, parse_certificate(issued, "test"), ours.authority.certificate)
    write_material(folder, material)
    return material


def test_a_device_renews_in_the_last_third_and_a_thief_then_shows(ours: House, tmp_path: Path) -> None:
    young = aged(ours, tmp_path / "young", "young", 200)
    assert played(renew_if_due(tmp_path / "young", ours.running.address)).certificate == young.certificate
    old = aged(ours, tmp_path / "old", "old", 300)
    fresh = played(renew_if_due(tmp_path / "old", ours.running.address))
    assert fresh.certificate.not_valid_after_utc > old.certificate.not_valid_after_utc + 200 * DAY
    kept = read_material(tmp_path / "old", datetime.now(UTC))
    assert (kept.certificate, kept.key_pem) == (fresh.certificate, fresh.key_pem)
    assert kept.key_pem != old.key_pem
    assert (tmp_path / "old" / "key.pem").stat().st_mode & 0o777 == 0o600

    async def thief() -> None:
        async with open_channel(ours.running.address, old) as channel:
            await federation(channel).Enroll(
                pb.EnrollRequest(protocol_version=NEWEST_PROTOCOL, csr=make_request(new_key()))
            )

    with pytest.raises(Exception, match="its key was stolen") as caught:
        played(thief())
    assert isinstance(error_of(caught.value, ""), CredentialError)
    assert ours.running.refusals.of("old") == {"caller": 1}


def test_a_persons_certificate_is_renewed_by_the_next_command(ours: House, tmp_path: Path) -> None:
    old = aged(ours, tmp_path / "ada", "ada", 300, Role.SUBMITTER)
    desk = AdminClient(ours.running.address, tmp_path / "ada")
    with pytest.raises(FedPEFTError):  # nobody answers people here
        played(desk.call(lambda stub: stub.ListRuns(pb.ListRunsRequest())))
    assert read_material(tmp_path / "ada", datetime.now(UTC)).certificate != old.certificate


def test_what_cannot_be_renewed_is_said_with_its_end(
    ours: House, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    aged(ours, tmp_path / "away", "away", 360)
    with caplog.at_level(logging.WARNING, "fedpeft.client"):
        played(renew_if_due(tmp_path / "away", "127.0.0.1:9"))
    assert "is not renewed yet" in caplog.messages[0]
    assert "expires in 4 days; renew it, or ask the federation's admin" in caplog.messages[1]


def agent(name: str, ends: datetime | None, *, connected: bool = True) -> AgentStatus:
    return AgentStatus(name, connected, "", 0.0, 1, 0, 0, "", {}, {}, 0, 0, 0, ends and ends.timestamp())  # type: ignore[arg-type]


def test_the_server_says_once_a_day_what_ends_soon() -> None:
    now = datetime(2026, 6, 1, tzinfo=UTC)
    server = ServerStatus(0.0, (now + 5 * DAY).timestamp(), 2, 10, {}, {})
    agents = [
        agent("late", now + 3 * DAY),
        agent("young", now + 100 * DAY),
        agent("open", None),
        agent("away", now + DAY, connected=False),
    ]
    watch = ExpiryWatch()
    assert watch.lines(server, agents, now) == [
        "the certificate of the server expires in 5 days; renew it",
        "the certificate of agent 'late' expires in 3 days; renew it",
    ]
    assert watch.lines(server, agents, now + 0.9 * DAY) == []
    assert len(watch.lines(server, agents, now + DAY)) == 2
    assert ExpiryWatch().lines(ServerStatus(0.0, None, 0, 10, {}, {}), [], now) == []
