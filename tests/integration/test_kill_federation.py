"""A real federation on loopback, whose server and agents are killed again and again while a run goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedpeft_client.transport.admin_client import AdminClient, run_and_answer
from tests.server.test_kill_anywhere import POINTS, asked
from tests.simulation.runs import simulated

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 500.0
DRAINED = "server.daemon.drained"  # reached when the server is told to end
SERVER = sorted(
    (name for name in POINTS if name.startswith(("server.results.", "server.daemon."))), key=DRAINED.__eq__
)
PRIVATE = [name for name in POINTS if name.startswith(("agent.privacy.", "agent.answer."))]
AGENT = [name for name in POINTS if name.startswith("agent.") and name not in PRIVATE]


def tables(folder: Path) -> dict[str, Any]:
    """Three clients with a file each; a stage that remembers from round to round; nobody may be missing."""
    draw = random.Random(0)
    for name in ("ann", "bob", "eve"):
        words = ["".join(draw.choice("abcdefgh") for _ in range(4)) for _ in range(12)]
        rows = [json.dumps({"q": f"reverse {word}", "a": word[::-1]}) for word in words]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    return {
        "run": {"name": "reverse", "rounds": len(SERVER) + len(AGENT) + 6},
        "peft": {"method": "lora", "r": 2},
        "data": {
            "train": [str(folder / f"{name}.jsonl") for name in ("ann", "bob", "eve")],
            "prompt": "{q} ",
            "answer": "{a}",
            "max_length": 32,
            "partitioner": {"kind": "files"},
        },
        "training": {"steps": 1, "batch_size": 4},
        "stages": [{"kind": "ternary", "density": 0.2, "error_feedback": True}],
        "federation": {"quorum": 1.0},
        "evaluation": {"bootstrap": 2, "metrics": ["token-accuracy"], "every": 1000},
    }


@dataclass
class Chain:
    """One process after the other: each is killed at its point, the next one is armed with the next point."""

    folder: Path
    name: str
    arguments: tuple[str, ...]
    points: list[str]
    killed: list[str] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None
    begins: int = 0  # where this process's log begins
    told: bool = False  # to end

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def marker(self) -> Path:
        """Made by the process that dies: a worker's death leaves its agent alive."""
        return self.folder / f"{self.name}-died-at-{len(self.killed)}"

    def tend(self) -> None:
        """Start what is not there; go on to the next point when this one was reached."""
        if self.points and self.marker.exists():
            alive = self.process is not None and self.process.poll() is None
            if alive and not self.points[0].startswith("agent.worker."):
                return  # it is dying
            self.killed.append(self.points.pop(0))
            if alive:  # a worker died; its agent is taken down to be armed anew
                self.end(signal.SIGKILL)
        if self.process is None or self.process.poll() is not None:
            self.start()
        if self.points[:1] == [DRAINED] and not self.told:
            self.told = b"listening on" in self.log.read_bytes()[self.begins :]
            if self.told and self.process is not None:
                self.process.send_signal(signal.SIGTERM)

    def start(self) -> None:
        armed = (
            {"FEDPEFT_CRASH_AT": self.points[0], "FEDPEFT_CRASH_ONCE": str(self.marker)}
            if self.points
            else {}
        )
        paths = os.pathsep.join(str(ROOT / f) for f in (".", "server", "client"))
        self.told = False
        with self.log.open("ab") as log:
            self.begins = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fedpeft.cli", *self.arguments],
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **armed},
                stdout=log,
                stderr=log,
            )

    def end(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait(timeout=60)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_federation_killed_at_every_point_ends_with_the_simulations_bytes(tmp_path: Path) -> None:
    run = tables(tmp_path)
    server, agents = held(tmp_path, run, SERVER, AGENT)
    assert server.killed == SERVER
    assert agents[0].killed == AGENT
    finished = simulated(run, tmp_path / "simulated").summary.finished
    assert finished is not None
    ((digest,),) = asked(tmp_path / "state", "SELECT adapter_digest FROM runs")
    assert digest == finished.adapter_digest
    counted = asked(tmp_path / "state", "SELECT round, count(*), sum(counted) FROM updates GROUP BY round")
    assert counted == [(number, 3, 3) for number in range(1, run["run"]["rounds"] + 1)]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_an_agent_killed_at_every_point_of_its_privacy_pays_once_for_each_round(tmp_path: Path) -> None:
    """Its charges and its answers are the rounds', one each, and no round is without its update."""
    run = tables(tmp_path)
    rounds = len(PRIVATE) + 3
    run["run"]["rounds"] = rounds
    run["federation"]["weighting"] = "uniform"
    run["stages"] = []
    run["privacy"] = {
        "kind": "local",
        "noise_multiplier": 20.0,
        "clip_norm": 1.0,
        "target_delta": 1e-4,
        "max_epsilon": 9.0,
    }
    _, agents = held(tmp_path, run, [], PRIVATE)
    assert agents[0].killed == PRIVATE
    lines = [
        json.loads(line) for line in (tmp_path / "home-ann/privacy/ledger.jsonl").read_text().splitlines()
    ]
    assert [line["round"] for line in lines if "charge" in line] == list(range(1, rounds + 1))
    assert [line["round"] for line in lines if "answer" in line] == list(range(1, rounds + 1))
    counted = asked(tmp_path / "state", "SELECT round, count(*), sum(counted) FROM updates GROUP BY round")
    assert counted == [(number, 3, 3) for number in range(1, rounds + 1)]


def held(
    folder: Path, run: dict[str, Any], server_points: list[str], agent_points: list[str]
) -> tuple[Chain, list[Chain]]:
    """Hold a run to its end, with the server killed at each of its points and one agent at its own."""
    (folder / "run.toml").write_text(tomli_w.dumps(run))
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    listening = ("--insecure", "--listen", address, "--state", "state")
    server = Chain(folder, "server", ("server", *listening), list(server_points))
    dialling = ("client", "--server", address, "--insecure")
    agents = [
        Chain(
            folder,
            name,
            (*dialling, "--data", f"{name}.jsonl", "--home", f"home-{name}"),
            list(agent_points) if name == "ann" else [],
        )
        for name in ("ann", "bob", "eve")
    ]
    chains = [server, *agents]
    try:
        submit_when_up(chains, folder / "run.toml", address)
        until_finished(chains, folder / "state")
    finally:
        for chain in chains:
            chain.end(signal.SIGKILL)
    return server, agents


def submit_when_up(chains: list[Chain], run_file: Path, address: str) -> None:
    """Submit as soon as a server stays up for long enough to take it; the same submission counts once."""
    from fedpeft.config.run_file import load_run, run_toml
    from fedpeft.errors import FederationError
    from fedpeft.v1 import federation_pb2 as pb

    request = pb.SubmitRunRequest(run_toml=run_toml(load_run(run_file)), submission="one")
    deadline = time.monotonic() + PATIENCE_S
    while True:
        assert time.monotonic() < deadline
        for chain in chains:
            chain.tend()
        try:
            run_and_answer(AdminClient(address).call(lambda stub: stub.SubmitRun(request)))
        except FederationError:
            time.sleep(0.2)
        else:
            return


def until_finished(chains: list[Chain], state: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while asked(state, "SELECT status FROM runs") != [("finished",)]:
        left = [chain.points for chain in chains]
        assert time.monotonic() < deadline, f"still to be reached: {left}"
        assert asked(state, "SELECT reason FROM runs WHERE status = 'failed'") == []
        for chain in chains:
            chain.tend()
        time.sleep(0.1)
