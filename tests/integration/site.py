"""A folder with a federation in it and its real processes on loopback, for tests that disturb them."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors.numpy import load_file

from simulations.deployment import ROOT, end_group, environment, free_ports, start_process

PATIENCE_S = 240.0
RUN_FILE = str(ROOT / "server" / "three_agents.toml")
AGENTS = ("north", "south", "east")  # the last one enrols with a token
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
    packages: tuple[Path, ...] = ()  # folders in which its processes find further packages

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        made = environment(
            FEDPEFT_SERVER=self.address, FEDPEFT_KEYS="federation/submitters/ada", FEDPEFT_TOKEN=self.token
        )
        paths = (made["PYTHONPATH"], *map(str, self.packages))
        return {**made, "PYTHONPATH": os.pathsep.join(paths)}

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
        process = start_process(
            self.words(*arguments), self.folder, self.folder / f"{name}.log", self.environment
        )
        self.processes[name] = process
        self.stack.callback(end_group, process)

    def start_server(self) -> None:
        config = self.folder / "server.toml"
        config.write_text(f"roots = [{json.dumps(str(ROOT / 'server'))}]\n")  # of the run file's test rows
        keys = ("--config", str(config), "--keys", "federation/server", "--authority", "federation/ca")
        self.start("server", "server", "--listen", self.address, "--state", "state", *keys)

    def start_agent(self, name: str, *more: str) -> None:
        data = str(ROOT / "client" / "data" / f"{name}.jsonl")
        own = () if name == AGENTS[-1] else ("--keys", f"federation/agents/{name}")
        self.start(
            name, "client", "--server", self.address, "--data", data, "--home", f"homes/{name}", *own, *more
        )

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


@contextmanager
def open_site(folder: Path) -> Iterator[Site]:
    """A site whose processes end with the block."""
    with ExitStack() as stack:
        yield Site(folder, free_ports(1)[0], stack)


def say(text: str) -> None:
    print(f"  {time.strftime('%H:%M:%S')}  {text}", flush=True)


def provision(site: Site) -> None:
    """Two agents get folders, one gets a token."""
    agents = [word for name in AGENTS[:-1] for word in ("--agent", name)]
    site.call("provision", "federation", "--host", "127.0.0.1", *agents, "--submitter", "ada")
    made = json.loads(site.call("provision", "federation", "--agent", AGENTS[-1], "--tokens", "--json"))
    (site.token,) = (item["token"] for item in made["tokens"])


def begin(site: Site, settings: Sequence[str]) -> str:
    """Start the simulation and the federation of one run file, and submit it; the run's id."""
    provision(site)
    words = [word for setting in settings for word in ("--set", setting)]
    site.start("simulation", "simulate", RUN_FILE, *words, "--out", "simulated", "--quiet", "--workers", "1")
    site.start_server()
    for name in AGENTS:
        site.start_agent(name)
    until("the server", lambda: "listening on" in site.log("server"))
    submitted: dict[str, str] = json.loads(site.call("run", "submit", RUN_FILE, *words, "--json"))
    return submitted["id"]


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
