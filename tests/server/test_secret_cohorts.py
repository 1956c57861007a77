"""Under client-level privacy nobody but the server's operator is told whom a round asked."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load

from fedpeft.credentials import Identity, Role
from fedpeft.privacy.accountant import epsilon
from fedpeft.privacy.events import ClientLevel
from fedpeft.v1 import federation_pb2 as pb
from fedpeft_server.runs.admin_messages import list_pullable_files, run_info
from fedpeft_server.runs.admin_servicer import Admin, Administration
from fedpeft_server.runs.supervisor import Supervisor
from fedpeft_server.store import RunStatus, Store
from fedpeft_server.transport.sessions import AgentStatus, ServerStatus
from tests.server.in_memory_grid import InMemoryGrid, standins
from tests.server.test_supervisor import Daemon, tables

DELTA = 1e-4
PRIVACY = {
    "kind": "client-level",
    "clip_norm": 50.0,
    "noise_multiplier": 2.0,
    "target_delta": DELTA,
    "max_epsilon": 100.0,
}
SEEDS = {
    "space": {"kind": "seed-scalars", "num_seeds": 8},
    "training": {"kind": "zeroth-order", "rule": "zo-sgd", "steps": 1, "batch_size": 2, "lr": 1e-6},
}


def secret(**federation: Any) -> dict[str, Any]:
    """Four rounds of secret cohorts in a seed space, whose states travel as steps."""
    sampling = {"kind": "poisson", "rate": 0.5}
    made = tables(weighting="uniform", sampling=sampling, quorum=0.0, **federation) | SEEDS
    return made | {"privacy": PRIVACY, "run": {"name": "secret", "rounds": 4}}


@pytest.fixture
def daemon(tmp_path: Path) -> Any:
    with Store(tmp_path / "state") as store:
        made = Daemon(store)
        yield made
        assert made.supervisor.drain(60.0)


def unruly(grid: InMemoryGrid) -> None:
    """One member is away once the roll was called: its absence must not show."""
    grid.leaving = {sorted(grid.get_node_ids())[0]}


@pytest.mark.slow
def test_neither_the_log_nor_the_files_of_a_run_tell_whom_it_asked(
    daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    daemon.prepared = unruly
    daemon.supervisor.start()
    with caplog.at_level(logging.INFO, logger="fedpeft.server"):
        stored = daemon.ended(daemon.submit(secret(deadline_s=3.0)).id)
    assert (stored.status, stored.round) == (RunStatus.FINISHED, 4), stored.reason
    lines = [json.loads(line.text) for line in daemon.store.runs.lines(stored.id)]
    told = [line for line in lines if line["event"] not in ("started", "finished")]
    assert [line["text"] for line in told if line["event"] == "step" and "round" in line["text"]] == [
        f"round {number}" for number in range(1, 5)
    ]
    words = re.compile(r"client-\d|\b(asked|late|away|folded)\b")
    found = [line for line in told if words.search(json.dumps(line))]
    assert not found
    assert {line["event"] for line in told} <= {"round", "step", "status", "note"}
    folder = daemon.store.run_folder(stored.id)
    checkpoints = [path for path in list_pullable_files(folder) if path.suffix == ".safetensors"]
    tensors = [set(load(path.read_bytes())) for path in checkpoints if "checkpoints" in path.parts]
    assert any(any(name.startswith("downlink/step/") for name in names) for names in tensors)
    assert not [name for names in tensors for name in names if "held" in name]


@pytest.mark.slow
def test_two_epsilons_are_told_one_for_those_who_see_the_cohorts(daemon: Daemon) -> None:
    daemon.supervisor.start()
    stored = daemon.ended(daemon.submit(secret()).id)
    hidden = [ClientLevel(noise_multiplier=2.0, sample_rate=0.5)] * 4
    seen = [ClientLevel(noise_multiplier=2.0, sample_rate=1.0)] * 4
    info = run_info(daemon.store, stored)
    assert info.epsilon == pytest.approx(epsilon(hidden, DELTA))
    assert info.epsilon_cohort == pytest.approx(epsilon(seen, DELTA))
    assert info.epsilon < info.epsilon_cohort
    report = (daemon.store.run_folder(stored.id) / "report.html").read_text()
    assert f"epsilon {info.epsilon_cohort:.3f} at delta" in report


class _OneCaller:
    """A gate for one caller, whose certificate was looked at already."""

    def __init__(self, role: Role) -> None:
        self._who = Identity("ada", role)

    def require(self, context: Any, role: Role) -> Identity:
        return self._who


class _BusyDesk:
    """Agents of which one has just answered."""

    def agents(self) -> list[AgentStatus]:
        return [
            AgentStatus(
                name="north",
                connected=True,
                address="ipv4:10.0.0.7:99",
                last_seen=1000.0,
                sessions=1,
                results=3,
                refusals=1,
                last_refusal="policy.runs",
                capabilities={"cores": "2"},
                refused={"update": 1},
                calls=5,
                bytes_up=10,
                bytes_down=20,
                certificate_ends=None,
            )
        ]

    def standing(self) -> ServerStatus:
        return ServerStatus(
            started=1.0,
            certificate_ends=None,
            connected=1,
            max_agents=9,
            refused={"update": 1},
            refused_nameless={},
        )

    def disconnect(self, agent: str, reason: str) -> None: ...


def listed(store: Store, role: Role) -> pb.ListAgentsReply:
    gate: Any = _OneCaller(role)
    supervisor = Supervisor(store, standins(store, []))
    base = Administration(store, supervisor, gate, None, _BusyDesk)
    reply: pb.ListAgentsReply = asyncio.run(Admin(base).ListAgents(pb.ListAgentsRequest(), None))
    return reply


def test_what_an_agent_did_is_for_admins(tmp_path: Path) -> None:
    with Store(tmp_path / "state") as store:
        whole, outline = (listed(store, role) for role in (Role.ADMIN, Role.SUBMITTER))
    assert whole.counted
    assert (whole.agents[0].results, whole.agents[0].bytes_up, whole.server.refused["update"]) == (3, 10, 1)
    assert not outline.counted
    (agent,) = outline.agents
    assert {field.name for field, _ in agent.ListFields()} == {"name", "connected", "capabilities"}
    assert {field.name for field, _ in outline.server.ListFields()} == {
        "version",
        "started_ms",
        "connected",
        "max_agents",
    }
