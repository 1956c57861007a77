"""The service of people over a real port, through the commands that people type."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from safetensors.numpy import load_file

from fedpeft.cli import main
from fedpeft.credentials import (
    Identity,
    PeerCheck,
    Role,
    create_authority,
    make_request,
    new_key,
    read_material,
)
from fedpeft.credentials.federation import create_federation
from fedpeft.errors import CredentialError
from fedpeft.ledger.records import ClientOutcome, Round
from fedpeft.v1 import federation_pb2 as pb
from fedpeft_client.transport.admin_client import AdminClient
from fedpeft_server.runs.admin_servicer import Admin, Administration
from fedpeft_server.runs.supervisor import Supervisor
from fedpeft_server.store import RunStatus, Store
from fedpeft_server.store.memory_store import MemoryAcceptor, MemoryBlobs
from fedpeft_server.transport.grpc_options import TransportOptions
from fedpeft_server.transport.serving import RunningServer, serve
from fedpeft_server.transport.tls import Doors, certificate_doors
from tests.server.fleet import played
from tests.server.in_memory_grid import InMemoryGrid, standins
from tests.server.test_supervisor import LONG_S, Daemon, tables
from tests.simulation.runs import simulated


@dataclass
class Site:
    """A daemon whose agents are stand-ins, and its address."""

    daemon: Daemon
    address: str
    folder: Path

    def run_file(self, made: dict[str, Any]) -> str:
        path = self.folder / "run.toml"
        path.write_text(tomli_w.dumps(made))
        return str(path)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with Store(tmp_path / "state") as store:
        daemon = Daemon(store)
        doors = Doors()
        running: list[RunningServer] = []
        base = Administration(store, daemon.supervisor, doors.gate, None, lambda: running[0])
        running.append(serve(TransportOptions(), store.results, store.blobs, doors=doors, admin=Admin(base)))
        yield Site(daemon, running[0].address, tmp_path)
        assert daemon.supervisor.drain(LONG_S)
        running[0].stop()


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """What a command prints; of one that fails, its line on standard error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    printed = capsys.readouterr()
    assert ended.value.code == code, printed.err
    return printed.err if code else printed.out


def test_a_run_from_submission_to_its_files(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    at = ("--server", site.address)
    run_id = json.loads(said(capsys, "run", "submit", site.run_file(tables()), *at, "--json"))["id"]
    log = said(capsys, "run", "logs", run_id, "--follow", *at)
    for text in ("roll call", "running", "round 1/2", "4/4 clients", "finished after 2 rounds"):
        assert text in log
    assert log.rstrip().endswith("finished")
    rows = [json.loads(line) for line in said(capsys, "run", "logs", run_id, *at, "--json").splitlines()]
    assert [row["round"] for row in rows if row["event"] == "round"] == [0, 1, 2]
    shown = json.loads(said(capsys, "run", "show", run_id, *at, "--json"))
    assert (shown["status"], shown["round"], shown["rounds"]) == ("finished", 2, 2)
    assert shown["agents"] == [f"client-{number}" for number in range(4)]
    assert set(shown["metrics"]) >= {"token-accuracy"}
    listed = json.loads(said(capsys, "run", "list", *at, "--json"))
    assert [run["id"] for run in listed] == [run_id]
    assert run_id in said(capsys, "run", "list", *at)
    out = site.folder / "pulled"
    assert "adapter" in said(capsys, "run", "pull", run_id, "--out", str(out), *at)
    kept = site.daemon.store.run_folder(run_id)
    for name in ("adapter/adapter_model.safetensors", "report.html", "metrics.jsonl", "run.toml"):
        assert (out / name).read_bytes() == (kept / name).read_bytes()
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [
        "round-000000.safetensors",
        "round-000002.safetensors",
    ]
    assert "--force" in said(capsys, "run", "pull", run_id, "--out", str(out), *at, code=7)
    said(capsys, "run", "pull", run_id, "--out", str(out), "--force", *at)
    mine = site.folder / "mine"
    mine.mkdir()
    (mine / "diary.txt").write_text("mine")
    said(capsys, "run", "pull", run_id, "--out", str(mine), "--force", *at, code=7)
    assert (mine / "diary.txt").read_text() == "mine"
    assert "round     2 of 2" in said(capsys, "run", "remove", run_id, *at)


def test_a_run_that_goes_on_is_pulled_as_far_as_it_is(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    def hold(grid: InMemoryGrid) -> None:
        grid.hold_after = 5  # in round 2

    site.daemon.prepared = hold
    at, out = ("--server", site.address), site.folder / "part"
    answer = said(capsys, "run", "submit", site.run_file(tables()), *at)
    assert answer.startswith("tiny-1  ")
    assert "begins when 4 agents are connected, as many as the run file has clients" in answer
    assert "data.partitioner plays no part: each agent brings its own rows" in answer
    site.daemon.reaches("tiny-1", RunStatus.RUNNING)
    assert site.daemon.grids[0].held.wait(LONG_S)
    assert "as of    round 1 of 2, not final" in said(capsys, "run", "pull", "tiny-1", "--out", str(out), *at)
    told = json.loads(said(capsys, "run", "pull", "tiny-1", "--out", str(out), "--force", "--json", *at))
    assert (told["ended"], told["round"], told["rounds"]) == (False, 1, 2)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [
        "round-000000.safetensors",
        "round-000001.safetensors",
    ]
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["finished"], summary["rounds_done"], summary["rounds"]) == (False, 1, 2)
    assert "1 of 2 rounds done" in (out / "report.html").read_text()
    state = load_file(out / "checkpoints" / "round-000001.safetensors")
    weights = load_file(out / "adapter" / "adapter_model.safetensors")
    trained = {name: array for name, array in state.items() if name.startswith("state/")}
    assert len(trained) == len(weights)
    assert sorted(a.tobytes() for a in trained.values()) == sorted(a.tobytes() for a in weights.values())
    assert [path.name for path in site.daemon.store.folder.glob(".scratch*")] == []

    site.daemon.grids[0].hold_after = None
    ended = site.daemon.ended("tiny-1")
    finished = simulated(tables(), site.folder / "simulated").summary.finished
    assert finished is not None
    assert ended.adapter_digest == finished.adapter_digest


def test_the_log_of_a_round_with_thousands_of_clients_can_be_read(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its record is one line that names all of them: 222 bytes each."""
    site.daemon.prepared = lambda grid: grid.away.update(range(1, 5))
    at = ("--server", site.address)
    run_id = json.loads(said(capsys, "run", "submit", site.run_file(tables()), *at, "--json"))["id"]
    outcomes = [
        ClientOutcome(client=f"agent-{n:05d}", status="folded", reason="x" * 60) for n in range(20_000)
    ]
    line = Round(round=1, outcomes=tuple(outcomes)).model_dump_json()
    assert len(line) > 4 << 20
    site.daemon.store.runs.say(run_id, line)
    assert line in said(capsys, "run", "logs", run_id, *at, "--json").splitlines()
    said(capsys, "run", "stop", run_id, *at)


def test_a_waiting_run_is_shown_and_stopped(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.daemon.prepared = lambda grid: grid.away.update(range(1, 5))
    at = ("--server", site.address)
    said(capsys, "run", "submit", site.run_file(tables()), "--min-agents", "3", *at)
    site.daemon.reaches("tiny-1", RunStatus.WAITING)
    assert "waiting-for-agents: 0 of 3 agents are connected" in said(capsys, "run", "show", "tiny-1", *at)
    answer = said(capsys, "run", "submit", site.run_file(tables()), "--agent", "nobody", *at)
    assert "begins when 1 agent is connected\n" in answer
    assert "only these are asked: nobody" in answer
    assert "not come to its first commit" in said(
        capsys, "run", "pull", "tiny-1", "--out", str(site.folder / "x"), *at, code=2
    )
    assert not (site.folder / "x").exists()
    stopped = said(capsys, "run", "stop", "tiny-1", "--reason", "wrong data", *at, "--json")
    assert (json.loads(stopped)["status"], json.loads(stopped)["detail"]) == ("stopped", "wrong data")


def test_what_the_server_refuses_ends_with_its_line_and_code(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ("--server", site.address)
    bad = tables()
    bad["peft"]["method"] = "nonsense"
    assert "nonsense" in said(capsys, "run", "submit", site.run_file(bad), *at, code=3)
    assert "there is no run 'x-1'" in said(capsys, "run", "show", "x-1", *at, code=2)
    assert "there is no run 'x-1'" in said(capsys, "run", "logs", "x-1", *at, code=2)
    assert "there is no run 'x-1'" in said(capsys, "run", "pull", "x-1", *at, code=2)
    assert "plaintext" in said(capsys, "run", "list", "--server", "192.0.2.1:9440", code=2)
    assert "HOST:PORT" in said(capsys, "run", "list", "--server", "nonsense", code=2)


def test_a_server_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    line = said(capsys, "run", "list", "--server", f"127.0.0.1:{port}", code=9)
    assert line.count("\n") == 1
    assert "does not answer" in line


def test_certificates_at_one_end_alone_are_named(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = datetime.now(UTC)
    created = create_federation(tmp_path / "federation", ["127.0.0.1"], now)
    keys = tmp_path / "federation" / "server"
    with_keys = ("--keys", str(keys))
    line = said(capsys, "run", "list", "--server", site.address, *with_keys, code=13)
    assert "answers without TLS" in line
    doors = certificate_doors(
        read_material(keys, now), PeerCheck(created.certificate, created.revoked_file), created, keys=keys
    )
    running = serve(TransportOptions(), MemoryAcceptor(), MemoryBlobs(), doors=doors)
    try:
        line = said(capsys, "run", "list", "--server", f"127.0.0.1:{running.port}", code=9)
    finally:
        running.stop()
    assert "it needs --keys" in line


def test_a_name_is_invited_once(tmp_path: Path) -> None:
    authority = create_authority(tmp_path / "ca", datetime.now(UTC))
    with Store(tmp_path / "state") as store:
        doors, running = Doors(), list[RunningServer]()
        supervisor = Supervisor(store, standins(store, []))
        base = Administration(store, supervisor, doors.gate, authority, lambda: running[0])
        running.append(serve(TransportOptions(), store.results, store.blobs, doors=doors, admin=Admin(base)))
        request = pb.IssueTokenRequest(name="hospital-1")

        def issued() -> str:
            return str(
                played(AdminClient(running[0].address).call(lambda stub: stub.IssueToken(request))).token
            )

        try:
            assert issued().startswith("fpt1.")
            with pytest.raises(CredentialError, match="'hospital-1' is there already"):
                issued()
            authority.revoke("hospital-1", datetime.now(UTC))
            assert issued().startswith("fpt1.")
        finally:
            running[0].stop()


def test_members_are_invited_and_revoked_by_commands_and_it_is_written_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    authority = create_authority(tmp_path / "ca", datetime.now(UTC))
    with Store(tmp_path / "state") as store:
        doors, running = Doors(), list[RunningServer]()
        supervisor = Supervisor(store, standins(store, []))
        base = Administration(store, supervisor, doors.gate, authority, lambda: running[0])
        running.append(serve(TransportOptions(), store.results, store.blobs, doors=doors, admin=Admin(base)))
        at = ("--server", running[0].address)
        try:
            options = ("--role", "submitter", "--days", "2", *at, "--json")
            made = said(capsys, "server", "invite", "ada", *options)
            token = json.loads(made)["token"]
            assert "'ada' is there already" in said(capsys, "server", "invite", "ada", *at, code=13)
            assert "no role is called 'king'" in said(
                capsys, "server", "invite", "bob", "--role", "king", *at, code=2
            )
            assert "ada" in said(capsys, "server", "revoke", "ada", "--reason", "left us", *at)
            assert "has no certificate" in said(capsys, "server", "revoke", "ada", *at, code=13)
        finally:
            running[0].stop()
        audit = ("server", "audit", "--state", str(store.folder))
        log = [json.loads(line) for line in said(capsys, *audit, "--json").splitlines()[1:-1]]
        done = [(entry["action"], entry["subject"]) for entry in log]
        assert done == [("invited", "ada"), ("revoked", "ada")]
        assert log[0]["detail"] == {"role": "submitter", "seconds": 172_800.0}
        assert log[1]["detail"] == {"reason": "left us"}
        assert token not in said(capsys, *audit)


def test_a_revoked_agent_is_listed_as_one(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    authority = create_authority(tmp_path / "ca", now)
    for name in ("hospital-1", "hospital-2"):
        token = authority.tokens.invite(Identity(name, Role.AGENT), now, timedelta(days=1))
        authority.enrol(token, make_request(new_key()), now)
    with Store(tmp_path / "state") as store:
        store.agents.record_seen(["hospital-1", "hospital-2"])
        doors, running = Doors(), list[RunningServer]()
        supervisor = Supervisor(store, standins(store, []))
        base = Administration(store, supervisor, doors.gate, authority, lambda: running[0])
        running.append(serve(TransportOptions(), store.results, store.blobs, doors=doors, admin=Admin(base)))

        def listed() -> dict[str, bool]:
            reply = played(
                AdminClient(running[0].address).call(lambda stub: stub.ListAgents(pb.ListAgentsRequest()))
            )
            return {agent.name: agent.revoked for agent in reply.agents}

        try:
            assert listed() == {"hospital-1": False, "hospital-2": False}
            authority.revoke("hospital-1", now)
            assert listed() == {"hospital-1": True, "hospital-2": False}
        finally:
            running[0].stop()
