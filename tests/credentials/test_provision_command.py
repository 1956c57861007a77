"""`fedpeft provision`: what it makes, what it refuses, what it says, and that it says no secrets."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpeft.cli import main
from fedpeft.credentials import PeerCheck, make_request, new_key, open_authority, read_material
from fedpeft.credentials.certificates import fingerprint
from fedpeft.errors import CredentialError
from tests.credentials.federation import NOW

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["provision", *map(str, arguments)])
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


@pytest.fixture
def federation(tmp_path: Path, call: Call) -> Path:
    folder = tmp_path / "federation"
    code, _, _ = call(folder, "--host", "localhost", "--host", "127.0.0.1", "--agent", "a1", "--admin", "ada")
    assert code == 0
    return folder


def answer(call: Call, *arguments: object) -> dict[str, Any]:
    code, out, err = call(*arguments, "--json")
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


def test_it_makes_folders_that_servers_and_agents_read(federation: Path) -> None:
    server, agent = (read_material(federation / place, NOW) for place in ("server", "agents/a1"))
    assert server.authority == agent.authority == open_authority(federation / "ca").certificate
    peers = PeerCheck(server.authority, federation / "server" / "revoked.pem")
    assert peers.identity(agent.certificate_pem, NOW).uri == "fedpeft://agent/a1"
    assert peers.identity(read_material(federation / "admins/ada", NOW).certificate_pem, NOW).role == "admin"


def test_every_key_is_its_owners_alone(federation: Path) -> None:
    keys = list(federation.rglob("key.pem"))
    assert len(keys) == 4
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}
    folders = {path.parent for path in keys} | {federation}
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}


def test_the_table_says_what_to_copy_where(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = call("fed", "--host", "server.example", "--agent", "a1")
    assert code == 0
    for part in ("fed/server", "server.example", "fed/agents/a1", "agent a1", "fed/ca", "delete it here"):
        assert part in out


def test_tokens_are_shown_once_and_work(federation: Path, call: Call) -> None:
    found = answer(call, federation, "--agent", "b1", "--submitter", "sam", "--tokens")
    assert [(item["name"], item["role"]) for item in found["tokens"]] == [
        ("b1", "agent"),
        ("sam", "submitter"),
    ]
    assert not (federation / "agents" / "b1").exists()
    authority = open_authority(federation / "ca")
    assert found["fingerprint_sha256"] == fingerprint(authority.certificate).hex()
    for item in found["tokens"]:
        authority.enrol(item["token"], make_request(new_key()), NOW)
    later = answer(call, federation)
    assert later["tokens"] == later["outstanding_tokens"] == []
    assert {item["name"] for item in later["members"]} == {"a1", "ada", "b1", "sam"}


def test_nothing_secret_is_printed_but_the_tokens_that_were_asked_for(federation: Path, call: Call) -> None:
    tokens = {item["token"] for item in answer(call, federation, "--agent", "b1", "--tokens")["tokens"]}
    outputs = [
        call(federation, *more)[1:]
        for more in ((), ("--json",), ("--renew-server",), ("--agent", "c1", "--json"), ("--revoke", "b1"))
    ]
    lines = [line for key in federation.rglob("key.pem") for line in key.read_text().split("\n")[1:-2]]
    for text in (text for output in outputs for text in output):
        assert "PRIVATE" not in text
        assert not any(secret in text for secret in (*lines, *tokens))


def test_a_new_server_key_for_the_same_hosts(federation: Path, call: Call) -> None:
    before = read_material(federation / "server", NOW)
    found = answer(call, federation, "--renew-server")
    after = read_material(federation / "server", NOW)
    assert found["server"]["renewed"]
    assert found["server"]["hosts"] == ["localhost", "127.0.0.1"]
    assert after.key_pem != before.key_pem
    assert after.authority == before.authority
    assert answer(call, federation, "--renew-server", "--host", "other")["server"]["hosts"] == ["other"]


def test_revoking_refuses_the_certificate_and_frees_the_name(federation: Path, call: Call) -> None:
    agent = read_material(federation / "agents/a1", NOW)
    assert answer(call, federation, "--revoke", "a1")["revoked"] == ["a1"]
    for listed in ("ca", "server"):
        with pytest.raises(CredentialError, match="revoked"):
            PeerCheck(agent.authority, federation / listed / "revoked.pem").identity(
                agent.certificate_pem, NOW
            )
    assert not (federation / "agents" / "a1").exists()
    assert answer(call, federation, "--agent", "a1")["issued"][0]["name"] == "a1"


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize(
    ("options", "code", "complaint"),
    [
        (["--host", "localhost"], 13, "not empty"),
        (["--agent", "a1"], 13, "there already"),
        (["--agent", "a1", "--tokens"], 13, "there already"),
        (["--agent", "n1", "--agent", "a1"], 13, "there already"),
        (["--agent", "../a1"], 13, "cannot be used"),
        (["--agent", "n1", "--admin", "n1"], 2, "named twice"),
        (["--tokens"], 2, "for whom"),
        (["--revoke", "a1", "--agent", "n1"], 2, "goes alone"),
        (["--revoke", "nobody"], 13, "no certificate and no token"),
        (["--renew-server", "--host", "http://x"], 13, "neither a host name"),
        (["--agent", "n1", "--tokens", "--token-days", "0"], 2, "token-days"),
        (["--agent", "n1", "--tokens", "--token-days", "31"], 2, "token-days"),
    ],
)
def test_what_is_refused_changes_nothing(
    federation: Path, call: Call, options: list[str], code: int, complaint: str
) -> None:
    before = everything(federation)
    ended, out, err = call(federation, *options)
    assert (ended, out) == (code, "")
    assert complaint in err
    assert len(err.splitlines()) == 1
    assert everything(federation) == before


@pytest.mark.parametrize(
    "options", [["--host", "a b"], ["--host", "ok", "--agent", "a/b"], ["--agent", "a1"], []]
)
def test_a_federation_that_cannot_be_made_leaves_nothing(
    tmp_path: Path, call: Call, options: list[str]
) -> None:
    code, _, err = call(tmp_path / "new", *options)
    assert (code, len(err.splitlines())) == (13, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_folder_is_left_alone(tmp_path: Path, call: Call) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    code, _, err = call(tmp_path, "--host", "localhost")
    assert (code, [path.name for path in tmp_path.iterdir()]) == (13, ["notes.txt"])
    assert "not empty" in err
