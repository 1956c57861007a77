"""What a device meets in the field: a wrong clock, an ended certificate, a full disk, a starting server."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedpeft.credentials import Identity, Material, Role, new_key, read_material, write_material
from fedpeft.credentials.certificates import parse_certificate
from fedpeft.credentials.federation import add_member, create_federation, invite_member, revoke_member
from fedpeft.errors import CredentialError, FederationError, ValidityError
from fedpeft_client.agent import Agent
from fedpeft_client.client_settings import ClientSettings
from fedpeft_client.commands.client_command import client_status_command, serve_agent
from fedpeft_client.status import read_status
from fedpeft_client.transport.device_certificate import own_material, renew_if_due
from fedpeft_client.transport.dialing import is_final
from fedpeft_client.workers.in_process_worker import InlineWorkshop
from tests.client.test_agent import agent, free_port
from tests.server.fleet import APP, RUN, answer, collected, fleet, messages, played, server, wait_for
from tests.server.test_doors import House, house

DAY = timedelta(days=1)
NORTH = Identity("north", Role.AGENT)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house(tmp_path_factory.mktemp("ca")) as made:
        yield made


def issued(ours: House, folder: Path, name: str, then: datetime) -> Material:
    """A folder whose certificate was made then; it begins a day before and ends after 365."""
    key = new_key()
    pem = ours.authority.device(key.public_key(), Identity(name, Role.AGENT), then)
    material = Material(key, parse_certificate(pem, "test"), ours.authority.certificate)
    write_material(folder, material)
    return material


def invited(ours: House, name: str) -> str:
    return ours.authority.tokens.invite(Identity(name, Role.AGENT), datetime.now(UTC), DAY)


def test_a_certificate_that_has_not_begun_is_waited_for(
    ours: House, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As of a device whose clock is a little slow: both ways of starting, and an agent that is running."""
    keys, name = tmp_path / "keys", "slow"
    begins = datetime.now(UTC) + timedelta(seconds=6)
    material = issued(ours, keys, name, begins + DAY)
    with pytest.raises(ValidityError, match="this machine's clock says"):
        read_material(keys, datetime.now(UTC))

    async def live() -> None:
        settings = ClientSettings(server=ours.running.address, data=tmp_path, connect_s=1.0)
        renewing = lambda: renew_if_due(keys, ours.running.address)  # noqa: E731 - as the command does
        made = Agent(settings, name, tmp_path / "home", renewing, APP, InlineWorkshop())
        run = asyncio.create_task(made.run())
        while made.status.state != "connected":
            assert not run.done(), run.exception()
            await asyncio.sleep(0.05)
        made.stop()
        await run

    with caplog.at_level(logging.WARNING, "fedpeft.client"):
        own = asyncio.run_coroutine_threadsafe(own_material(keys, ours.running.address, ""), _loop())
        played(live(), 60.0)
    assert own.result(60.0).certificate == material.certificate
    assert datetime.now(UTC) > begins - timedelta(seconds=1)
    said = [line for line in caplog.messages if "set it" in line]
    assert 1 <= len(said) <= 4, "each of the two says it once in a minute, however often it looks"


def _loop() -> asyncio.AbstractEventLoop:
    from fedpeft_server.transport.grpc_event_loop import get_grpc_event_loop

    return get_grpc_event_loop()


def test_a_device_whose_clock_is_slow_says_so_and_asks_for_no_token(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with house(tmp_path / "ca", ahead=30 * DAY) as later, caplog.at_level(logging.WARNING, "fedpeft.client"):
        token = later.authority.tokens.invite(NORTH, datetime.now(UTC) + 30 * DAY, DAY)
        with pytest.raises(TimeoutError):
            played(asyncio.wait_for(own_material(tmp_path / "keys", later.running.address, token), 1.0))
    assert "and this machine's clock says" in caplog.messages[0]
    assert not [line for line in caplog.messages if "token" in line]


def test_what_ends_by_itself_is_not_final() -> None:
    assert not is_final(ValidityError("expired"))
    assert is_final(CredentialError("revoked"))


def test_a_new_token_is_the_way_back_of_an_ended_certificate(
    ours: House, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An old token changes nothing."""
    address, now = ours.running.address, datetime.now(UTC)
    keys = tmp_path / "ended"
    issued(ours, keys, "ended", now - 400 * DAY)
    token = invited(ours, "ended")
    back = played(own_material(keys, address, token))
    assert back.certificate.not_valid_after_utc > now + 300 * DAY
    for later in (token, ""):
        assert played(own_material(keys, address, later)).certificate == back.certificate
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_token_that_is_refused_leaves_an_ended_certificate_to_the_clock(
    ours: House, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = tmp_path / "ended"
    issued(ours, keys, "ended", datetime.now(UTC) - 400 * DAY)
    spent = invited(ours, "ended")[:-3] + "AAA"
    with caplog.at_level(logging.WARNING, "fedpeft.client"), pytest.raises(TimeoutError):
        played(asyncio.wait_for(own_material(keys, ours.running.address, spent), 2.0))
    assert "the token is not used, and the certificate that is here stays" in caplog.messages[0]
    assert "expired on" in caplog.messages[1]


@pytest.mark.parametrize("name", ["valid", "another"])
def test_a_token_replaces_no_certificate_that_is_valid(
    ours: House, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """Under no name, its own neither: the token is left for when it is needed."""
    keys = tmp_path / "keys"
    mine = issued(ours, keys, "valid", datetime.now(UTC))
    token = invited(ours, name)
    with caplog.at_level(logging.INFO, "fedpeft.client"):
        assert played(own_material(keys, ours.running.address, token)).certificate == mine.certificate
    (line,) = caplog.messages
    assert line.startswith(f"the token is not used: the certificate in {keys} is valid until ")
    assert played(own_material(tmp_path / "later", ours.running.address, token))


def test_an_agent_whose_certificate_is_revoked_uses_its_token(
    ours: House, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not before the server has said so, and once."""
    keys, now = tmp_path / "keys", datetime.now(UTC)
    mine = issued(ours, keys, "revoked", now - 100 * DAY)
    ours.authority.revoke("revoked", now)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("")
    settings = ClientSettings(server=ours.running.address, data=rows, keys=keys, home=tmp_path / "home")
    made: list[Agent] = []
    with pytest.raises(CredentialError, match="revoked"):
        played(serve_agent(settings, "", made.append), 60.0)
    token = invited(ours, "revoked")

    async def live() -> None:
        serving = asyncio.create_task(serve_agent(settings, token, made.append))
        while made[-1].status.state != "connected":
            assert not serving.done(), serving.exception()
            await asyncio.sleep(0.02)
        made[-1].stop()
        await serving

    with caplog.at_level(logging.WARNING, "fedpeft.client"):
        played(live(), 60.0)
    assert read_material(keys, datetime.now(UTC)).certificate != mine.certificate
    assert [line for line in caplog.messages if "the token is used for a new certificate" in line]
    ours.authority.revoke("revoked", datetime.now(UTC))
    with pytest.raises(CredentialError, match="revoked"):  # a token that was used is not tried again
        played(serve_agent(settings, token, made.append), 60.0)


def test_the_folder_of_a_member_whose_certificate_has_ended_is_in_nobodys_way(tmp_path: Path) -> None:
    folder, now = tmp_path / "federation", datetime.now(UTC)
    create_federation(folder, ["localhost"], now - 401 * DAY)
    for name in ("north", "east"):
        who = Identity(name, Role.AGENT)
        add_member(folder, who, now - 400 * DAY)
        if name == "east":
            assert revoke_member(folder, name, now) == 0
        fresh = add_member(folder, who, now)
        assert read_material(fresh.folder, now).certificate.not_valid_after_utc == fresh.expires
        with pytest.raises(CredentialError, match="is there already"):
            add_member(folder, who, now)
        assert revoke_member(folder, name, now) == 1
        assert invite_member(folder, who, now, DAY).identity == who
    with pytest.raises(CredentialError, match="has no certificate and no token"):
        revoke_member(folder, "south", now)


def test_an_agent_whose_disk_is_full_stays_and_tries_again(tmp_path: Path) -> None:
    outbox, aside = tmp_path / "site-a" / "outbox", tmp_path / "aside"
    with server() as running, fleet(running.address, ["site-a"], tmp_path) as agents:
        grid = running.grid(RUN)
        wait_for(lambda: grid.agents_here)
        outbox.rename(aside)
        outbox.write_text("in the way, as a disk that takes nothing is")
        ids = list(grid.push_messages(messages(grid, ["site-a"], b"hi")))
        wait_for(lambda: "outbox" in agents["site-a"].status.last_error)
        assert list(grid.pull_messages(ids)) == []
        outbox.unlink()
        aside.rename(outbox)
        assert answer(collected(grid, ids)[0])["asked"] == 1
    assert json.loads((tmp_path / "site-a" / "status.json").read_text())["failures"] == 0


def test_a_status_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    with server() as running, fleet(running.address, ["site-a"], tmp_path) as agents:
        grid = running.grid(RUN)
        wait_for(lambda: grid.agents_here)
        agents["site-a"].status._path = tmp_path / "nowhere" / "status.json"
        (reply,) = grid.send_and_receive(messages(grid, ["site-a"], b"hi"))
        assert answer(reply)["asked"] == 1


def test_a_server_that_does_not_answer_yet_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def live() -> None:
        await (await agent(tmp_path, f"127.0.0.1:{free_port()}", connect_s=2.0)).run()

    with caplog.at_level(logging.WARNING, "fedpeft.client"), pytest.raises(FederationError):
        played(live())
    assert len([line for line in caplog.messages if "does not answer" in line]) == 1


def test_the_last_error_is_shown_with_its_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def live() -> None:
        await (await agent(tmp_path, f"127.0.0.1:{free_port()}", connect_s=0.3)).run()

    with pytest.raises(FederationError):
        played(live())
    at = read_status(tmp_path)["at"]["last_error"]
    assert abs(at - time.time()) < 60.0
    client_status_command(tmp_path, "", as_json=False)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("last error")]
    assert time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at)) in line
