"""A real federation on loopback, as people start it: certificates, a server, three agents with rows.

One agent is killed while it trains, the server while a round is open. What is pulled at the end is what the
same run file gives undisturbed on one machine.
"""

from __future__ import annotations

import functools
import hashlib
import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from safetensors.numpy import load_file

from simulations.deployment import ROOT, end_group, environment, free_ports, started

ROUNDS, PATIENCE_S = 8, 240.0
AGENTS = ("north", "south", "east")  # the last one enrols with a token
SETTINGS = (f"run.rounds={ROUNDS}", "training.steps=4", "evaluation.every=100")
Answer = TypeVar("Answer")


def until(what: str, look: Callable[[], Answer], pause_s: float = 0.005) -> Answer:
    """The first true answer."""
    deadline = time.monotonic() + PATIENCE_S
    while not (answer := look()):
        assert time.monotonic() < deadline, f"{what} did not come to be"
        time.sleep(pause_s)
    return answer


@dataclass
class Site:
    """A folder with a federation in it, and its processes by name."""

    folder: Path
    port: int
    stack: ExitStack
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    token: str = ""

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        return environment(
            FEDPEFT_SERVER=self.address, FEDPEFT_KEYS="federation/submitters/ada", FEDPEFT_TOKEN=self.token
        )

    def words(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "fedpeft.cli", *arguments]

    def call(self, *arguments: str) -> str:
        """What a command prints."""
        done = subprocess.run(
            self.words(*arguments), cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self, name: str, *arguments: str) -> None:
        process = started(self.words(*arguments), self.folder, self.folder / f"{name}.log", self.environment)
        self.processes[name] = process
        self.stack.callback(end_group, process)

    def start_server(self) -> None:
        keys = ("--keys", "federation/server", "--authority", "federation/ca")
        self.start("server", "server", "--listen", self.address, "--state", "state", *keys)

    def start_agent(self, name: str) -> None:
        data = str(ROOT / "client" / "data" / f"{name}.jsonl")
        own = () if name == AGENTS[-1] else ("--keys", f"federation/agents/{name}")
        self.start(name, "client", "--server", self.address, "--data", data, "--home", f"homes/{name}", *own)

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.processes[name].wait(10)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def doing(self, name: str) -> str:
        """What an agent says that it is at."""
        path = self.folder / "homes" / name / "status.json"
        return str(json.loads(path.read_text())["doing"]) if path.exists() else ""

    def asked(self, question: str) -> list[tuple[Any, ...]]:
        """Rows of the server's database, whether it runs or not."""
        with closing(sqlite3.connect(self.folder / "state" / "state.db", timeout=30)) as connection:
            return connection.execute(question).fetchall()

    def open_round(self) -> int:
        found = self.asked("SELECT number FROM rounds WHERE status = 'open'")
        return int(found[0][0]) if found else 0

    def came(self, number: int) -> set[str]:
        """Whose updates of a round are durable."""
        return {row[0] for row in self.asked(f"SELECT agent FROM updates WHERE round = {number}")}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(tmp_path, free_ports(1)[0], stack)


def say(text: str) -> None:
    print(f"  {time.strftime('%H:%M:%S')}  {text}", flush=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft calls it
def test_killed_agents_and_a_killed_server_change_nothing(site: Site) -> None:
    provision(site)
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    run_file = str(ROOT / "server" / "three_agents.toml")
    site.start(
        "simulation", "simulate", run_file, *settings, "--out", "simulated", "--quiet", "--workers", "1"
    )
    site.start_server()
    for name in AGENTS:
        site.start_agent(name)
    until("the server", lambda: "listening on" in site.log("server"))
    run_id = json.loads(site.call("run", "submit", run_file, *settings, "--json"))["id"]
    site.start("lines", "run", "logs", run_id, "--follow")
    say(f"submitted {run_id}")

    kill_an_agent_at_work(site, "south")
    status = json.loads(site.call("client", "status", "--home", "homes/south", "--json"))
    assert (status["running"], status["state"]) == (False, "connected")
    site.start_agent("south")

    kill_the_server_in_a_round(site)
    site.start_server()

    assert site.processes["lines"].wait(PATIENCE_S) == 0, site.log("lines")
    assert site.log("lines").splitlines()[-1].endswith("finished"), site.log("lines")
    say("finished")
    counted = site.asked("SELECT round, count(*), sum(counted) FROM updates GROUP BY round")
    assert counted == [(number, 3, 3) for number in range(1, ROUNDS + 1)]
    assert site.asked("SELECT count(*) FROM updates WHERE length(signature) = 0") == [(0,)]

    site.call("run", "pull", run_id, "--out", "pulled")
    assert site.processes["simulation"].wait(PATIENCE_S) == 0, site.log("simulation")
    check_adapters(site.folder, json.loads(site.call("run", "show", run_id, "--json")))
    for name in (*AGENTS, "server"):
        site.processes[name].send_signal(signal.SIGTERM)
        assert site.processes[name].wait(30) == 0, site.log(name)
        assert "Traceback" not in site.log(name)


def provision(site: Site) -> None:
    """Two agents get folders, one gets a token."""
    agents = [word for name in AGENTS[:-1] for word in ("--agent", name)]
    site.call("provision", "federation", "--host", "127.0.0.1", *agents, "--submitter", "ada")
    made = json.loads(site.call("provision", "federation", "--agent", AGENTS[-1], "--tokens", "--json"))
    (site.token,) = (item["token"] for item in made["tokens"])


def kill_an_agent_at_work(site: Site, name: str) -> None:
    """kill -9 while it trains; the others' updates of that round are there, its own is not."""
    while True:
        until("training", lambda: site.open_round() > 1 and site.doing(name).startswith("train"))
        number = site.open_round()
        site.kill(name)
        if number and name not in site.came(number):
            break
        site.start_agent(name)  # its update was through already
    until("the others", lambda: len(site.came(number)) == len(AGENTS) - 1, 0.05)
    assert (site.open_round(), name in site.came(number)) == (number, False)
    say(f"{name} was killed in round {number}; the others' updates wait for it")


def kill_the_server_in_a_round(site: Site) -> None:
    """kill -9 while a round is open and an update is still missing."""
    last = site.open_round()
    while True:
        until("the next round", functools.partial(in_a_later_round, site, last))
        site.kill("server")
        number = site.open_round()
        came = site.came(number)
        if number and len(came) < len(AGENTS):
            say(f"the server was killed in round {number} with {len(came)} of {len(AGENTS)} updates")
            return
        last = number  # between two rounds
        site.start_server()


def in_a_later_round(site: Site, last: int) -> bool:
    return site.open_round() > last and bool(site.doing("north") and site.doing("east"))


def check_adapters(folder: Path, shown: dict[str, Any]) -> None:
    """The pulled adapter is the simulation's, and changes what the model says."""
    from importlib.resources import files

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    content = [
        (folder / name / "adapter" / "adapter_model.safetensors").read_bytes()
        for name in ("pulled", "simulated")
    ]
    assert hashlib.sha256(content[0]).digest() == hashlib.sha256(content[1]).digest()
    rows = [json.loads(line) for line in (folder / "simulated" / "metrics.jsonl").read_text().splitlines()]
    (finished,) = (row for row in rows if row["event"] == "finished")
    assert shown["adapter_digest"] == finished["adapter_digest"]
    say(f"the adapter is that of the simulation: {shown['adapter_digest'][:12]}")

    base = AutoModelForCausalLM.from_pretrained(str(files("fedpeft.data.embedded") / "model"))
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = base(tokens).logits
        after = PeftModel.from_pretrained(base, str(folder / "pulled" / "adapter"))(tokens).logits
    assert not np.allclose(before.numpy(), after.numpy())
    weights = load_file(folder / "pulled" / "adapter" / "adapter_model.safetensors")
    assert all(np.isfinite(array).all() for array in weights.values())
