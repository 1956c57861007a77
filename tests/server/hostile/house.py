"""A daemon as it is, with an honest submitter's runs in it, for people who try what is not theirs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import tomli_w

from fedpeft.config.run_file import build_run
from fedpeft.credentials import Identity, Role
from fedpeft.credentials.federation import add_member, create_federation, open_federation
from fedpeft.errors import FedPEFTError
from fedpeft.v1 import federation_pb2 as pb
from fedpeft_client.transport.admin_client import AdminClient, run_and_answer
from fedpeft_server.ops.daemon import standing
from fedpeft_server.ops.server_settings import LimitsSection, ServerSettings, TlsSection
from fedpeft_server.store import Rules, RunStatus, Store, StoredRun
from fedpeft_server.store.audit_log import AuditEntry, find_faults, read_entries
from fedpeft_server.transport.serving import RunningServer

SECRET = b"what ada's run has learned"


def tables(name: str = "tiny", rounds: int = 2, **more: Any) -> dict[str, Any]:
    """A small run that waits for agents, of which there are none."""
    return {
        "run": {"name": name, "rounds": rounds},
        "data": {"limit": 32, "max_length": 64, "partitioner": {"kind": "iid", "clients": 4}},
        "training": {"steps": 1, "batch_size": 4},
        **more,
    }


@dataclass
class House:
    """A running daemon, its state, and the runs of ada that others want.

    Attributes:
        finished, waiting: ada's alone.
        shared: ada's, which bob may read.
    """

    folder: Path
    store: Store
    running: RunningServer
    finished: StoredRun
    waiting: StoredRun
    shared: StoredRun

    def member(self, name: str, role: Role = Role.SUBMITTER) -> AdminClient:
        """Somebody with a certificate of that name and role, new or known."""
        place = self.folder / "federation" / f"{role}s" / name
        if not place.exists():
            add_member(self.folder / "federation", Identity(name, role), datetime.now(UTC))
        return AdminClient(self.running.address, place)

    def entries(self) -> list[AuditEntry]:
        """The audit log, whole."""
        entries = list(read_entries(self.store.database))
        faults, _ = find_faults(iter(entries), [])
        assert faults == []
        return entries

    def standing(self) -> str:
        """A digest of all that is ada's: rows, logs, files."""
        mine = (self.finished, self.waiting, self.shared)
        digest = hashlib.sha256()
        for stored in mine:
            now = self.store.runs.get(stored.id)
            row: list[object] = [now.id, now.status.final, now.submitter, now.readers]
            if now.status.final:  # what goes on says how it stands
                row += [now.status, now.reason, [line.text for line in self.store.runs.lines(stored.id)]]
            digest.update(json.dumps(row).encode())
            if not now.status.final:
                continue  # it begins, waits and says so
            for file in sorted(self.store.run_folder(stored.id).rglob("*")):
                digest.update(file.as_posix().encode() + (file.read_bytes() if file.is_file() else b""))
        return digest.hexdigest()


def refusal(call: Callable[..., object], *arguments: Any, **more: Any) -> FedPEFTError:
    """The error that a call ends with; one that succeeds fails the test."""
    try:
        came = call(*arguments, **more)
    except FedPEFTError as error:
        return error
    raise AssertionError(f"was answered: {str(came)[:300]}")


def asked(desk: AdminClient, method: str, request: Any) -> Any:
    """One call's answer; of a stream, the list of what came."""

    async def ask() -> Any:
        if method == "Logs":
            return [line async for line in desk.lines(request.id, follow=request.follow)]
        return await desk.call(lambda stub: getattr(stub, method)(request))

    return run_and_answer(ask())


def submit(desk: AdminClient, made: dict[str, Any], submission: str, **more: Any) -> pb.RunInfo:
    """Submit a run file that is given as tables."""
    request = pb.SubmitRunRequest(run_toml=tomli_w.dumps(made), submission=submission, **more)
    info: pb.RunInfo = asked(desk, "SubmitRun", request)
    return info


@contextmanager
def house(folder: Path, limits: LimitsSection | None = None) -> Iterator[House]:
    """A daemon with certificates whose runs find no agents."""
    create_federation(folder / "federation", ["127.0.0.1"], datetime.now(UTC))
    settings = ServerSettings(
        listen="127.0.0.1:0",
        state=folder / "state",
        tls=TlsSection(keys=folder / "federation" / "server", authority=folder / "federation" / "ca"),
        limits=limits or LimitsSection(submitter_runs=3, submitter_rounds=100, refusals_per_hour=100_000),
    )
    with standing(settings) as (store, supervisor, running):
        runs: list[StoredRun] = []
        for name, readers in (("done", ()), ("idle", ()), ("open", ("bob",))):
            made = build_run(tables(f"ada-{name}"), source="test")
            runs.append(store.runs.submit(made, Rules(), submission=name, submitter="ada", readers=readers))
        store.runs.set_status(runs[0].id, RunStatus.FINISHED)
        store.runs.set_status(runs[2].id, RunStatus.FINISHED)
        for stored in (runs[0], runs[2]):
            adapter = store.run_folder(stored.id) / "adapter"
            adapter.mkdir(parents=True)
            (adapter / "adapter_model.safetensors").write_bytes(SECRET)
        store.runs.say(runs[0].id, json.dumps({"event": "note", "text": SECRET.decode()}))
        yield House(folder, store, running, *runs)
        supervisor.drain(30.0)


def token_for(made: House, name: str, role: Role) -> str:
    """A token that an admin made for somebody."""
    authority = open_federation(made.folder / "federation")
    return authority.tokens.invite(Identity(name, role), datetime.now(UTC), timedelta(days=1))
