"""Three agents and a server on a bad network, killed now and then: is anything lost, does anything leak?

Question: do hours of kills, reconnects and delays change a byte of any run, lose an update, or make the
          server or an agent grow?
Command:  python simulations/soak.py [--minutes 30] [--seed 0] [--here]
Expected: every run ends with the adapter of the undisturbed run, every accepted update is counted, and
          neither memory nor file handles of what lived through grow.
Run time: as asked, 30 minutes by default, and about three more for the undisturbed run and the last one's
          end.

A server and three agents on loopback with certificates on both sides (`--here`: in plaintext, with agents in
this process, for a short test), each agent behind a relay of its own that delays, stalls and resets; a run
with error feedback, whose bytes depend on everything that came before, is submitted again and again. Draws of
the seed choose what happens next: kill -9 of an agent, of its worker, or of the server; a reset line; a line
on which nothing passes for longer or shorter than the two ends' patience; slow lines; a stopped process. The
server is killed in the first half only and the agent `north` never, so that there are long lives to measure:
growth is the median of a life's last third against that of its middle third, once a first run has ended. The
last line printed is one JSON object. Logs, state and samples stay in --out, if that is given.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import tomli_w

from fedpeft.config.run_file import load_run, run_toml
from fedpeft.errors import FedPEFTError
from fedpeft.runtime.frames import Frame
from fedpeft.v1 import federation_pb2 as pb
from fedpeft_client.agent import Agent
from fedpeft_client.client_settings import ClientSettings
from fedpeft_client.status import read_status
from fedpeft_client.transport.admin_client import AdminClient, new_submission
from fedpeft_client.workers.in_process_worker import InlineWorkshop
from fedpeft_server.transport.grpc_event_loop import get_grpc_event_loop
from simulations.bad_network import Network, network
from simulations.deployment import ROOT, end_group, environment, free_ports, start_process

AGENTS = ("north", "south", "east")
STEADY = AGENTS[0]  # never killed
PATIENCE_S = 600.0
SAMPLE_S = 1.0
MEMORY_GROWTH = 0.03  # of a life's middle third, or so many MiB if that is more
MEMORY_MIB, HANDLES = 12.0, 3


def run_tables(rounds: int, steps: int) -> dict[str, Any]:
    """The three agents' example with error feedback, short and again and again."""
    run = load_run(ROOT / "server" / "three_agents.toml")
    return {
        "run": {"name": "soak", "rounds": rounds},
        "peft": {"method": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "data": {
            "train": str(ROOT / "client" / "data"),
            "test": str(run.data.test),
            "prompt": "{prompt}",
            "answer": "{answer}",
            "max_length": 128,
            "partitioner": {"kind": "files", "clients": len(AGENTS)},
        },
        "training": {"lr": 5e-3, "steps": steps, "batch_size": 8},
        "stages": [{"kind": "top-k", "density": 0.1, "error_feedback": True}],
        "evaluation": {"metrics": ["exact-match"], "every": 1000},
    }


# ---- The agents, as processes or in this one


class Fleet(Protocol):
    """Agents that can be killed and come back."""

    def start(self, name: str) -> None:
        """Dial through the agent's line."""
        ...

    def kill(self, name: str) -> None:
        """End it without a word."""
        ...

    def pid(self, name: str) -> int | None:
        """Its process; None where it has none of its own."""
        ...

    def has_ended(self, name: str) -> bool:
        """Whether it is gone, of itself or not."""
        ...

    def results(self, name: str) -> int:
        """How many of its results the server has acknowledged, in all its lives."""
        ...


class Processes:
    """`fedpeft client` for each."""

    def __init__(self, folder: Path, lines: Network, stack: ExitStack) -> None:
        self._folder, self._lines, self._stack = folder, lines, stack
        self._held: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        """See `Fleet`."""
        where = f"127.0.0.1:{self._lines.lines[name].port}"
        words = ["client", "--server", where, "--data", str(ROOT / "client" / "data" / f"{name}.jsonl")]
        words += ["--home", f"homes/{name}", "--keys", f"federation/agents/{name}"]
        self._held[name] = process = start_process(
            command(*words), self._folder, self._folder / f"{name}.log", environment(MALLOC_ARENA_MAX="2")
        )
        self._stack.callback(end_group, process)

    def kill(self, name: str) -> None:
        """See `Fleet`."""
        self._held[name].kill()
        self._held[name].wait(10)

    def pid(self, name: str) -> int | None:
        """See `Fleet`."""
        return self._held[name].pid

    def has_ended(self, name: str) -> bool:
        """See `Fleet`."""
        return self._held[name].poll() is not None

    def results(self, name: str) -> int:
        """See `Fleet`."""
        with suppress(FedPEFTError, ValueError):
            return int(read_status(self._folder / "homes" / name)["results"])
        return 0


class Turns:
    """A `Worker` of this process that agents share: they have one loaded model, so one works at a time."""

    def __init__(self) -> None:
        self._inner, self._turn = InlineWorkshop(), asyncio.Lock()

    async def do(self, order: Frame) -> Frame:
        """Carry it out when its turn comes."""
        async with self._turn:
            return await self._inner.do(order)

    async def interrupt(self) -> None:
        """Nothing: the turn goes on to its end."""

    async def release(self) -> None:
        """Nothing is held."""

    async def close(self) -> None:
        """Nothing to end."""


class Here:
    """Agents of this process; killed, they leave without saying so, and their homes stay."""

    def __init__(self, folder: Path, lines: Network) -> None:
        self._folder, self._lines, self._turns = folder, lines, Turns()
        self._held: dict[str, tuple[Agent, Future[None]]] = {}

    def start(self, name: str) -> None:
        """See `Fleet`."""
        settings = ClientSettings(
            server=f"127.0.0.1:{self._lines.lines[name].port}",
            data=ROOT / "client" / "data" / f"{name}.jsonl",
            insecure=True,
            connect_s=0.0,
        )

        async def made() -> Agent:
            return Agent(
                settings, name, self._folder / name, None, "fedpeft.flower.in_process_app:app", self._turns
            )

        loop = get_grpc_event_loop()
        agent = asyncio.run_coroutine_threadsafe(made(), loop).result(30)
        self._held[name] = agent, asyncio.run_coroutine_threadsafe(agent.run(), loop)

    def kill(self, name: str) -> None:
        """See `Fleet`."""
        agent, run = self._held[name]
        get_grpc_event_loop().call_soon_threadsafe(agent.stop)
        run.exception(30)

    def pid(self, name: str) -> int | None:
        """See `Fleet`."""
        return None

    def has_ended(self, name: str) -> bool:
        """See `Fleet`."""
        return self._held[name][1].done()

    def results(self, name: str) -> int:
        """See `Fleet`."""
        return self._held[name][0].status.usage.results

    def close(self) -> None:
        """End all."""
        for name in self._held:
            with suppress(FedPEFTError):
                self.kill(name)


def command(*words: str) -> list[str]:
    """`fedpeft`, of this checkout."""
    return [sys.executable, "-m", "fedpeft.cli", *words]


# ---- The site


@dataclass
class Site:
    """The server's process, the agents, and what is noted about them."""

    folder: Path
    port: int
    secure: bool
    stack: ExitStack
    server: subprocess.Popen[bytes] | None = None
    server_starts: int = 0

    def start_server(self) -> None:
        """`fedpeft server`, with the state that is there."""
        keys = (
            ["--keys", "federation/server", "--authority", "federation/ca"] if self.secure else ["--insecure"]
        )
        roots = ["--root", str(ROOT / "server")]  # of the run's test rows
        words = command("server", "--listen", f"127.0.0.1:{self.port}", "--state", "state", *roots, *keys)
        self.server = start_process(
            words, self.folder, self.folder / "server.log", environment(MALLOC_ARENA_MAX="2")
        )
        self.server_starts += 1
        self.stack.callback(end_group, self.server)

    def reachable(self) -> bool:
        """Whether it listens."""
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def kill_server(self) -> None:
        """Kill -9, whatever it is at."""
        if self.server is not None:
            self.server.kill()
            self.server.wait(10)

    @property
    def desk(self) -> AdminClient:
        """For submitting; beside the agents' lines."""
        return AdminClient(
            f"127.0.0.1:{self.port}", self.folder / "federation/submitters/ada" if self.secure else None
        )

    def submit(self, text: str) -> str | None:
        """Queue a run; None while the server is away."""
        if not self.reachable():
            return None
        request = pb.SubmitRunRequest(run_toml=text, submission=new_submission())
        asked = self.desk.call(lambda stub: stub.SubmitRun(request))
        with suppress(FedPEFTError, TimeoutError):
            return str(asyncio.run_coroutine_threadsafe(asked, get_grpc_event_loop()).result(60).id)
        return None

    def query(self, question: str) -> list[tuple[Any, ...]]:
        """Rows of the server's database, whether it runs or not; none before there is one."""
        place = f"file:{self.folder / 'state/state.db'}?mode=ro"
        with suppress(sqlite3.OperationalError), closing(sqlite3.connect(place, uri=True)) as database:
            return database.execute(question).fetchall()
        return []

    def list_unfinished(self) -> list[str]:
        """Runs that have not ended."""
        return [
            row[0]
            for row in self.query("SELECT id FROM runs WHERE status NOT IN ('finished', 'failed', 'stopped')")
        ]


@dataclass
class Samples:
    """Memory and file handles of processes over their lives; a life is one pid."""

    rows: list[tuple[float, str, int, float, int]] = field(default_factory=list)  # s, who, pid, MiB, handles

    def take(self, at: float, who: str, pid: int | None) -> None:
        """Note one process, if it lives."""
        if pid is None:
            return
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            with process.oneshot():
                self.rows.append((at, who, pid, process.memory_info().rss / 2**20, process.num_fds()))

    def longest(self, who: str) -> list[tuple[float, float, int]]:
        """Seconds, MiB and handles of its longest life."""
        count = Counter(pid for _, one, pid, _, _ in self.rows if one == who)
        if not count:
            return []
        (pid, _), *_ = count.most_common(1)
        return [(at, mib, handles) for at, one, own, mib, handles in self.rows if (one, own) == (who, pid)]


def growth(life: list[tuple[float, float, int]], settled: float) -> dict[str, float] | None:
    """From the middle third to the last third of a life after `settled`; None where that is too short."""
    later = [row for row in life if row[0] >= settled]
    third = len(later) // 3
    if third < 60:
        return None
    middle, last = later[third : 2 * third], later[2 * third :]
    mib = [statistics.median(row[1] for row in part) for part in (middle, last)]
    handles = [statistics.median(row[2] for row in part) for part in (middle, last)]
    return {
        "minutes": (later[-1][0] - later[0][0]) / 60,
        "mib": mib[1],
        "mib_grown": mib[1] - mib[0],
        "handles": handles[1],
        "handles_grown": handles[1] - handles[0],
    }


# ---- What goes wrong


class Trouble:
    """One misfortune after the other, drawn from a seed."""

    def __init__(self, site: Site, fleet: Fleet, lines: Network, rng: random.Random) -> None:
        self._site, self._fleet, self._lines, self._rng = site, fleet, lines, rng
        self._due: list[tuple[float, str, Callable[[], None]]] = []  # what mends itself, and when
        self._worked: dict[str, int] = {}  # results of an agent when its worker was killed last
        self.counts: Counter[str] = Counter()

    def happen(self, *, server_too: bool) -> None:
        """The next one."""
        kinds = {"reset line": 5, "stalled line": 3, "slow lines": 2, "killed agent": 3, "killed worker": 2}
        kinds |= {"stopped agent": 1} | ({"killed server": 4} if server_too else {})
        (kind,) = self._rng.choices(list(kinds), list(kinds.values()))
        name = self._rng.choice(AGENTS)
        if self._one(kind, name):
            self.counts[kind] += 1
            say(f"{kind}: {name}" if "server" not in kind and "lines" not in kind else kind)

    def _one(self, kind: str, name: str) -> bool:
        rng, pid = self._rng, self._fleet.pid(name)
        if any(owner in (name, "server" if kind == "killed server" else "") for _, owner, _ in self._due):
            return False
        if kind == "reset line":
            self._lines.cut(name)
        elif kind == "stalled line":
            self._lines.lines[name].stall(rng.choice((3.0, 20.0, 60.0)))  # heartbeats give up after 45 s
        elif kind == "slow lines":
            for line in self._lines.lines.values():
                line.delay_s = rng.choice((0.0, 0.01, 0.05, 0.2))
        elif kind == "killed server" and self._site.reachable():
            self._site.kill_server()
            self._later(rng.uniform(0.0, 8.0), "server", self._site.start_server)
        elif kind == "killed agent" and name != STEADY:
            self._fleet.kill(name)
            self._later(rng.uniform(0.0, 8.0), name, lambda: self._fleet.start(name))
        elif kind == "killed worker" and pid is not None:
            return self._kill_worker(name, pid)
        elif kind == "stopped agent" and pid is not None:
            psutil.Process(pid).suspend()
            self._later(rng.uniform(1.0, 30.0), name, lambda: psutil.Process(pid).resume())
        else:
            return False
        return True

    def mend(self, *, all_of_it: bool = False) -> None:
        """Bring back what is due, or everything."""
        now = time.monotonic()
        for due in [one for one in self._due if all_of_it or one[0] <= now]:
            self._due.remove(due)
            due[2]()
        if all_of_it:
            self._lines.mend()

    @property
    def server_away(self) -> bool:
        """Whether it is dead at the moment."""
        return any(owner == "server" for _, owner, _ in self._due)

    def away(self, name: str) -> bool:
        """Whether an agent is dead or stopped at the moment."""
        return any(owner == name for _, owner, _ in self._due)

    def _later(self, seconds: float, owner: str, mend: Callable[[], None]) -> None:
        self._due.append((time.monotonic() + seconds, owner, mend))

    def _kill_worker(self, name: str, pid: int) -> bool:
        """Once for each task at most: one whose worker is killed a second time is an error."""
        results = self._fleet.results(name)
        if self._worked.get(name, -1) >= results:
            return False
        self._worked[name] = results
        with suppress(psutil.Error):
            for child in psutil.Process(pid).children():
                child.kill()
                return True
        return False


# ---- The soak


def run_undisturbed(folder: Path, run_file: Path) -> str:
    """The adapter's digest of the run on one machine."""
    words = command(
        "simulate", str(run_file), "--out", str(folder / "undisturbed"), "--quiet", "--workers", "1"
    )
    subprocess.run(words, cwd=folder, env=environment(), check=True, stdout=subprocess.DEVNULL)
    rows = map(json.loads, (folder / "undisturbed" / "metrics.jsonl").read_text().splitlines())
    return next(str(row["adapter_digest"]) for row in rows if row["event"] == "finished")


def run_undisturbed_here(folder: Path, run_file: Path) -> str:
    """The same in this process, whose agents then have the run loaded."""
    from fedpeft.ledger import RunFolder
    from fedpeft.reporting.progress import make_progress
    from fedpeft.simulation.engine import simulate

    run = load_run(run_file)
    with RunFolder.create(folder / "undisturbed", run) as made, make_progress("quiet") as progress:
        result = simulate(made, workers=1, engine="local", progress=progress)
    if result.summary.finished is None:
        raise RuntimeError("the undisturbed run did not end")
    return result.summary.finished.adapter_digest


def soak(
    site: Site, fleet: Fleet, trouble: Trouble, text: str, seconds: float, every_s: float
) -> tuple[Samples, float]:
    """Trouble for so long, then the end of what is under way; samples, and when the first run had ended."""
    rng, samples = random.Random(1), Samples()
    until_under_way(site, text)
    began = next_sample = time.monotonic()
    next_trouble, settled = began + every_s, 0.0
    while (now := time.monotonic()) < began + seconds or site.list_unfinished():
        over = now >= began + seconds
        if over:
            trouble.mend(all_of_it=True)
            if now > began + seconds + PATIENCE_S:
                raise RuntimeError(f"{site.list_unfinished()} did not end; see {site.folder / 'server.log'}")
        elif now >= next_trouble:
            trouble.happen(server_too=now < began + seconds / 2)
            next_trouble = now + rng.expovariate(1 / every_s)
        trouble.mend()
        refuse_ended(site, fleet, trouble)
        if now >= next_sample:
            sample(samples, now - began, site, fleet)
            next_sample = now + SAMPLE_S
        if not settled and site.query("SELECT 1 FROM runs WHERE status = 'finished'"):
            settled = now - began
        if not over and not trouble.server_away and not site.list_unfinished():
            run = site.submit(text)
            if run is not None:
                say(f"submitted {run}")
        time.sleep(0.2)
    return samples, settled


def until_under_way(site: Site, text: str) -> None:
    """Submit a first run, and wait for its first round."""
    deadline = time.monotonic() + PATIENCE_S
    while not site.query("SELECT 1 FROM rounds WHERE number > 0"):
        if not site.list_unfinished() and (run := site.submit(text)):
            say(f"submitted {run}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"no round was opened; see {site.folder / 'server.log'}")
        time.sleep(0.2)


def refuse_ended(site: Site, fleet: Fleet, trouble: Trouble) -> None:
    """Nothing of the federation ends but by our hand.

    Raises:
        RuntimeError: something did.
    """
    if site.server is not None and site.server.poll() is not None and not trouble.server_away:
        raise RuntimeError(f"the server ended by itself; see {site.folder / 'server.log'}")
    if any(fleet.has_ended(name) for name in AGENTS if not trouble.away(name)):
        raise RuntimeError(f"an agent ended by itself; see the logs in {site.folder}")


def sample(samples: Samples, at: float, site: Site, fleet: Fleet) -> None:
    """Note all processes."""
    samples.take(at, "server", site.server.pid if site.server else None)
    for name in AGENTS:
        samples.take(at, name, fleet.pid(name))
        samples.take(at, f"{name}'s worker", worker_of(fleet.pid(name)))


def worker_of(pid: int | None) -> int | None:
    """The process that trains for an agent, if there is one at the moment."""
    with suppress(psutil.Error):
        children = psutil.Process(pid).children() if pid is not None else []
        return children[0].pid if children else None
    return None


def verdict(site: Site, wanted: str, rounds: int) -> dict[str, Any]:
    """What the ledger says of all runs."""
    runs = site.query("SELECT id, status, adapter_digest FROM runs ORDER BY place")
    counted = site.query("SELECT run, count(*), sum(counted) FROM updates GROUP BY run")
    full = (rounds * len(AGENTS), rounds * len(AGENTS))
    return {
        "runs": len(runs),
        "runs_with_the_same_bytes": sum(row[1:] == ("finished", wanted) for row in runs),
        "updates": sum(row[1] for row in counted),
        "runs_with_every_update_counted": sum(row[1:] == full for row in counted),
        "refusals": dict(site.query("SELECT reason, sum(count) FROM refusals GROUP BY reason")),
    }


def failures(result: dict[str, Any]) -> list[str]:
    """What the soak shall not find."""
    found = [
        f"{result['runs']} runs, {result[key]} {key.replace('_', ' ')}"
        for key in ("runs_with_the_same_bytes", "runs_with_every_update_counted")
        if not result["runs"] or result[key] != result["runs"]
    ]
    for who, grown in result["growth"].items():
        if grown and grown["mib_grown"] > max(MEMORY_MIB, MEMORY_GROWTH * grown["mib"]):
            found.append(f"{who} grew by {grown['mib_grown']:.0f} MiB")
        if grown and grown["handles_grown"] > HANDLES:
            found.append(f"{who} holds {grown['handles_grown']:.0f} file handles more")
    return found


@contextmanager
def federation(folder: Path, *, here: bool, rng: random.Random) -> Iterator[tuple[Site, Fleet, Network]]:
    """Server, agents and the lines between them."""
    with ExitStack() as stack:
        (port,) = free_ports(1)
        site = Site(folder, port, not here, stack)
        lines = stack.enter_context(network(port, AGENTS, rng))
        if here:
            fleet: Fleet = Here(folder / "homes", lines)
            (folder / "homes").mkdir()
        else:
            members = [word for name in AGENTS for word in ("--agent", name)]
            words = command("provision", "federation", "--host", "127.0.0.1", *members, "--submitter", "ada")
            subprocess.run(words, cwd=folder, env=environment(), check=True, stdout=subprocess.DEVNULL)
            fleet = Processes(folder, lines, stack)
        site.start_server()
        for name in AGENTS:
            fleet.start(name)
        try:
            yield site, fleet, lines
        finally:
            if isinstance(fleet, Here):
                fleet.close()


def run_soak(
    folder: Path, *, minutes: float, seed: int, here: bool, rounds: int, every_s: float
) -> dict[str, Any]:
    """All of it, in an empty folder; the last key is what went wrong."""
    run_file = folder / "soak.toml"
    run_file.write_text(tomli_w.dumps(run_tables(rounds, 1 if here else 2)))
    wanted = (run_undisturbed_here if here else run_undisturbed)(folder, run_file)
    say(f"undisturbed: {wanted[:12]}")
    rng = random.Random(seed)
    with federation(folder, here=here, rng=rng) as (site, fleet, lines):
        trouble = Trouble(site, fleet, lines, rng)
        samples, settled = soak(site, fleet, trouble, run_toml(load_run(run_file)), 60 * minutes, every_s)
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples.rows))
        result = {
            "minutes": minutes,
            "seed": seed,
            "troubles": dict(trouble.counts),
            "server_starts": site.server_starts,
            "bytes_through_the_lines": sum(line.passed for line in lines.lines.values()),
            **verdict(site, wanted, rounds),
            "growth": {who: growth(samples.longest(who), settled) for who in ("server", STEADY)},
        }
    return result | {"failures": failures(result)}


def say(text: str) -> None:
    """A line with the time."""
    print(f"  {time.strftime('%H:%M:%S')}  {text}", flush=True)


def main() -> None:
    """Soak, print what was found, and exit with 1 if that is anything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=30, help="of each run")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two troubles, on average")
    parser.add_argument("--here", action="store_true", help="agents in this process, in plaintext")
    parser.add_argument(
        "--out", type=Path, help="a folder for logs, state and samples; else they are deleted"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedpeft-soak-") as name:
        try:
            result = run_soak(
                Path(name),
                minutes=options.minutes,
                seed=options.seed,
                here=options.here,
                rounds=options.rounds,
                every_s=options.every,
            )
        finally:
            if options.out:
                shutil.copytree(name, options.out, dirs_exist_ok=True)
    for key, value in result.items():
        print(f"  {key.replace('_', ' '):<32} {value}")
    print(json.dumps(result | {"script": Path(__file__).name}))
    sys.exit(bool(result["failures"]))


if __name__ == "__main__":
    main()
