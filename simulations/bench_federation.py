"""What a round costs beside the training itself, and what one server carries.

Question: how long is a round of resident agents that have nothing to compute, against Flower's SuperLink and
          SuperNodes with the same run? With --load: how fast come 1,000 small updates, and 200 large ones?
Command:  python simulations/bench_federation.py [--quick] [--no-superlink] [--load]
Expected: at least 50x less than the SuperLink; the base model loaded once per agent; with --load, 1,000
          updates of 1 KB durable within 1 s, and uploads at half the speed of a bare gRPC stream where the
          disk is as fast as that.
Run time: about a minute with --quick, 3 minutes without, 3 minutes with --load, on two idle cores.

The daemon is the real one (`fedpeft server --insecure` on loopback, plaintext), with its durable commits in
SQLite, below TMPDIR. All is measured in one run on one machine; only ratios travel. Agents of the empty step
share one process with --quick and have one process each otherwise; there are 10. The SuperLink has 2 nodes
and 4 rounds, of which the first is left out, to its advantage: 10 nodes would start five times as many
processes. With --quick it has 1 node, which has the machine for itself. Each message starts a new process
there. Three warm rounds are measured, and `speedup_vs_superlink` is of medians; `speedup_vs_superlink_worst`
sets the quickest of the three against the slowest of a hundred of ours. Nothing else is at work while either
is timed (`superlink_beside_other_work_s` would say so). With --load, agents are the bare protocol, and
collect_s is the time from a round's opening to its last update's acceptance. The last line printed is one
JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tomli_w

from fedpeft.config.run_file import build_run, run_toml
from fedpeft.v1 import federation_pb2 as pb
from fedpeft_client.agent import Agent
from fedpeft_client.client_settings import ClientSettings
from fedpeft_client.transport.admin_client import AdminClient, new_submission
from fedpeft_client.workers.in_process_worker import InlineWorkshop
from fedpeft_server.transport.grpc_event_loop import get_grpc_event_loop
from simulations.deployment import (
    ROOT,
    end_group,
    environment,
    free_ports,
    start_process,
    superlink,
    wait_for_port,
)
from simulations.federation_load import Answers, Prepared, bare_upload_s, connect_agents, name_of

PATIENCE_S = 900.0  # four rounds of a SuperLink on a busy machine
MANY_AGENTS_APP = "fedpeft.flower.in_process_app:app"  # works with a simulation that the process holds
Answer = TypeVar("Answer")


def until(what: str, look: Callable[[], Answer], pause_s: float = 0.02) -> Answer:
    """The first true answer."""
    deadline = time.monotonic() + PATIENCE_S
    while not (answer := look()):
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not come to be")
        time.sleep(pause_s)
    return answer


def run_on_loop(work: Coroutine[Any, Any, Answer]) -> Answer:
    """Run on the process's one loop for gRPC."""
    return asyncio.run_coroutine_threadsafe(work, get_grpc_event_loop()).result(PATIENCE_S)


@dataclass(frozen=True)
class Daemon:
    """`fedpeft server` in a process of its own."""

    process: subprocess.Popen[bytes]
    address: str
    folder: Path

    def submit(self, tables: dict[str, Any], *, agents: int) -> str:
        """Queue a run; its id."""
        run = build_run(tables, source="bench")
        request = pb.SubmitRunRequest(
            run_toml=run_toml(run), submission=new_submission(), cohort=pb.CohortRules(min_agents=agents)
        )
        return str(run_on_loop(AdminClient(self.address).call(lambda stub: stub.SubmitRun(request))).id)

    def query(self, question: str, *values: object) -> list[tuple[Any, ...]]:
        """Rows of its database."""
        with closing(sqlite3.connect(self.folder / "state" / "state.db", timeout=30)) as connection:
            return connection.execute(question, values).fetchall()

    def status(self, run: str) -> str:
        """How a run stands.

        Raises:
            RuntimeError: it failed.
        """
        ((status, reason),) = self.query("SELECT status, reason FROM runs WHERE id = ?", run)
        if status in ("failed", "paused"):
            raise RuntimeError(f"{run} is {status}: {reason}")
        return str(status)

    def wait_for_end(self, run: str) -> None:
        """Wait for a run's end."""
        until(f"the end of {run}", lambda: self.status(run) == "finished", 0.2)

    def wait_for_rounds(self, run: str, rounds: int) -> None:
        """Wait until so many rounds are committed; what comes after a run's last one is not waited for."""

        def look() -> bool:
            self.status(run)
            question = "SELECT count(*) FROM rounds WHERE run = ? AND status = 'closed' AND number > 0"
            return bool(self.query(question, run)[0][0] >= rounds)

        until(f"round {rounds} of {run}", look, 0.1)

    def round_ms(self, run: str) -> list[float]:
        """From the opening of each round but the first to that of the next: all of it, commits included."""
        opened = [
            row[0] for row in self.query("SELECT opened_at FROM rounds WHERE run = ? ORDER BY number", run)
        ]
        return [1000 * (after - before) for before, after in itertools.pairwise(opened[1:])]

    def collect_s(self, run: str) -> list[float]:
        """From the opening of each round to the acceptance of its last update; not the first of several."""
        question = (
            "SELECT max(accepted_at) - opened_at FROM rounds JOIN updates ON updates.run = rounds.run AND"
            " updates.round = rounds.number WHERE rounds.run = ? GROUP BY number ORDER BY number"
        )
        spans = [row[0] for row in self.query(question, run)]
        return spans[1:] or spans

    def memory_mib(self, field: str = "VmHWM") -> float:
        """The process's own memory: its peak, or with "VmRSS" what it holds now."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        (line,) = (line for line in text.splitlines() if line.startswith(f"{field}:"))
        return int(line.split()[1]) / 1024

    def forget_peak(self) -> None:
        """Begin a new peak (Linux)."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")


@contextmanager
def daemon(folder: Path) -> Iterator[Daemon]:
    """A server with a state folder of its own."""
    folder.mkdir()
    (port,) = free_ports(1)
    words = [sys.executable, "-m", "fedpeft.cli", "server", "--insecure", "--listen", f"127.0.0.1:{port}"]
    process = start_process([*words, "--state", "state"], folder, folder / "server.log", environment())
    try:
        wait_for_port(port, process, folder / "server.log")
        yield Daemon(process, f"127.0.0.1:{port}", folder)
    finally:
        end_group(process)


# ---- Rounds without work


def empty_run(folder: Path, *, clients: int, rounds: int, name: str = "empty") -> dict[str, Any]:
    """A LoRA run on the embedded model whose clients compute nothing; 4 rows a client, no evaluation."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": f"{n}+1=", "a": str(n + 1)}) + "\n" for n in range(4 * clients)))
    return {
        "run": {"name": name, "rounds": rounds},
        "peft": {"method": "lora", "r": 2, "target_modules": ["q_proj", "v_proj"]},
        "data": {
            "train": str(rows),
            "prompt": "{q}",
            "answer": "{a}",
            "max_length": 32,
            "partitioner": {"kind": "iid", "clients": clients},
        },
        "training": {"kind": "none"},
        "evaluation": {"every": 100_000, "bootstrap": 1},
    }


@contextmanager
def agents_here(address: str, names: Sequence[str], folder: Path, data: Path) -> Iterator[None]:
    """Agents in this process."""
    settings = ClientSettings(server=address, data=data, insecure=True)

    async def made() -> list[Agent]:
        return [
            Agent(settings, name, folder / name, None, MANY_AGENTS_APP, InlineWorkshop()) for name in names
        ]

    with running(run_on_loop(made())):
        yield


@contextmanager
def running(agents: Sequence[Agent]) -> Iterator[None]:
    """Agents at work, until the block ends."""
    loop = get_grpc_event_loop()
    runs: list[Future[None]] = [asyncio.run_coroutine_threadsafe(agent.run(), loop) for agent in agents]
    try:
        yield
    finally:
        for agent in agents:
            loop.call_soon_threadsafe(agent.stop)
        for run in runs:
            run.exception(30)


@contextmanager
def agent_processes(address: str, names: Sequence[str], folder: Path) -> Iterator[None]:
    """`fedpeft client` for each, with a file of rows of its own."""
    processes = []
    for number, name in enumerate(names):
        data = folder / f"{name}.jsonl"
        data.write_text(
            "".join(json.dumps({"q": f"{n}+{number}=", "a": str(n + number)}) + "\n" for n in range(4))
        )
        words = [sys.executable, "-m", "fedpeft.cli", "client", "--server", address, "--insecure"]
        words += ["--data", str(data), "--home", str(folder / "homes" / name)]
        processes.append(start_process(words, folder, folder / f"{name}.log", environment()))
    try:
        yield
    finally:
        for process in processes:
            end_group(process)


NAMES = [f"client-{number}" for number in range(10)]


def prepare(folder: Path, *, rounds: int, processes: bool) -> dict[str, Any]:
    """The run of `empty_rounds`; where its agents are to share this process, their model is loaded here."""
    tables = empty_run(folder, clients=len(NAMES), rounds=rounds)
    if processes:
        tables["data"]["partitioner"] = {"kind": "files", "clients": len(NAMES)}
    else:
        from fedpeft.participant.load_simulation import load_simulated_run  # seconds, while others begin too
        from fedpeft.participant.loaded_run import set_loaded_run

        set_loaded_run(load_simulated_run(build_run(tables, source="bench")))
    return tables


def empty_rounds(
    server: Daemon, folder: Path, tables: dict[str, Any], *, rounds: int, processes: bool
) -> dict[str, float]:
    """Ten agents' rounds; the first one, which loads the base model everywhere, is left out."""
    if processes:
        serving = agent_processes(server.address, NAMES, folder)
    else:
        serving = agents_here(server.address, NAMES, folder / "homes", folder / "rows.jsonl")
    with serving:
        run = server.submit(tables, agents=len(NAMES))
        server.wait_for_rounds(run, rounds)
    spans = sorted(server.round_ms(run))
    return {
        "agents": len(NAMES),
        "rounds": rounds,
        "round_ms_p50": statistics.median(spans),
        "round_ms_p99": spans[min(len(spans) - 1, int(0.99 * len(spans)))],
        "collect_s": statistics.median(server.collect_s(run)),
    }


def loads_per_agent(server: Daemon, folder: Path, *, agents: int, rounds: int) -> list[int]:
    """How often agents with real local steps load the base model over a run: processes of their own."""
    folder.mkdir()
    names = ["north", "south"][:agents]
    tables = empty_run(folder, clients=len(names), rounds=rounds, name="real") | {
        "training": {"steps": 1, "batch_size": 2}
    }
    tables["data"] |= {
        "partitioner": {"kind": "files", "clients": len(names)},
        "prompt": "{prompt}",
        "answer": "{answer}",
    }

    async def made() -> list[Agent]:
        return [
            Agent(
                ClientSettings(
                    server=server.address, data=ROOT / "client" / "data" / f"{name}.jsonl", insecure=True
                ),
                name,
                folder / "homes" / name,
                None,
            )
            for name in names
        ]

    made_agents = run_on_loop(made())
    with running(made_agents):
        server.wait_for_rounds(server.submit(tables, agents=len(names)), rounds)
    return [agent.status.loads for agent in made_agents]


@dataclass(frozen=True)
class Flown:
    """The same empty rounds on Flower's processes: wall times, and when the first of them was opened."""

    ms: list[float]
    opened_at: float


def run_flower(stack: ExitStack, folder: Path, *, nodes: int, rounds: int) -> Flown:
    """Start Flower's processes, until the stack closes, and hold rounds; the first is left out.

    They are read as soon as the last one is committed: the run's end is not waited for.
    """
    (folder / "flower").mkdir(parents=True)
    flower = stack.enter_context(superlink(folder / "flower", nodes))
    run_file, rows = folder / "run.toml", folder / "out" / "metrics.jsonl"
    run_file.write_text(tomli_w.dumps(empty_run(folder, clients=nodes, rounds=rounds)))
    flower.submit(run_file, folder / "out")

    def measured() -> list[float]:
        lines = rows.read_text().split("\n")[:-1] if rows.exists() else []
        found = [row for row in map(json.loads, lines) if row["event"] == "round" and row["round"]]
        return [1000 * row["wall_s"] for row in found] if len(found) == rounds else []

    found = until("the last round on the SuperLink", measured, 0.1)
    return Flown(found[1:], time.time() - sum(found[1:]) / 1000)


# ---- Load


def collection(server: Daemon, *, agents: int, rounds: int) -> dict[str, float]:
    """Seed-scalar updates of a thousand agents."""
    tables = serve_run("small", agents, rounds)
    tables |= {"peft": {"method": "full"}, "space": {"kind": "seed-scalars", "num_seeds": 384}}
    tables["training"] = {"kind": "zeroth-order", "rule": "zo-sgd", "steps": 1, "batch_size": 1, "lr": 1e-6}
    answers = Answers.of(tables)
    clients = run_on_loop(connect_agents(server.address, agents, Prepared(answers, agents, rounds)))
    run = server.submit(tables, agents=agents)
    server.wait_for_end(run)
    run_on_loop(end_agents(clients))
    return {
        "agents": agents,
        "update_bytes": len(answers.train(name_of(0), 0, 1)),
        "collect_s": statistics.median(server.collect_s(run)),
        "round_ms_p50": statistics.median(server.round_ms(run)),
    }


def uploads(server: Daemon, folder: Path, *, agents: int, rounds: int) -> dict[str, float]:
    """Large updates, against the same bytes over a bare stream."""
    tables = serve_run("large", agents, rounds)
    tables["peft"] = {"method": "lora", "r": 264, "target_modules": "all-linear"}
    answers = Answers.of(tables)
    size = len(answers.train(name_of(0), 0, 1))
    bare = bare_s(folder, [answers.train(name_of(0), 0, 1)] * agents)
    clients = run_on_loop(connect_agents(server.address, agents, Prepared(answers, agents, rounds)))
    run = server.submit(tables, agents=agents)
    until("the first round", lambda: server.query("SELECT 1 FROM rounds WHERE run = ? AND number = 1", run))
    base = server.memory_mib("VmRSS")
    server.forget_peak()
    server.wait_for_end(run)
    run_on_loop(end_agents(clients))
    collect_s = min(server.collect_s(run))
    return {
        "upload_agents": agents,
        "upload_bytes": size,
        "upload_base_mib": base,
        "upload_peak_mib": server.memory_mib() - base,
        "upload_mb_per_s": agents * size / collect_s / 1e6,
        "bare_mb_per_s": agents * size / bare / 1e6,
        "upload_fraction_of_bare": bare / collect_s,
    }


def serve_run(name: str, agents: int, rounds: int) -> dict[str, Any]:
    """A run whose agents bring the rows, as the server sees it."""
    return {
        "run": {"name": name, "rounds": rounds},
        "data": {
            "train": "nowhere.jsonl",
            "prompt": "{q}",
            "answer": "{a}",
            "max_length": 32,
            "partitioner": {"kind": "files", "clients": agents},
        },
        "evaluation": {"every": 100_000, "bootstrap": 1},
    }


def bare_s(folder: Path, bodies: list[bytes]) -> float:
    """Seconds of the bare stream, to a process of its own; four at a time, as our server takes them."""
    ready = folder / "sink"
    words = [sys.executable, "-m", "simulations.federation_load", str(ready)]
    process = start_process(words, folder, folder / "sink.log", environment())
    try:
        port = until("the bare server", lambda: ready.exists() and ready.read_text())
        return min(run_on_loop(bare_upload_s(f"127.0.0.1:{port}", bodies, 4)) for _ in range(2))
    finally:
        end_group(process)


async def end_agents(clients: Sequence[asyncio.Task[None]]) -> None:
    """End agents."""
    for client in clients:
        client.cancel()
    await asyncio.gather(*clients, return_exceptions=True)


# ---- The two reports


def load_report(folder: Path, *, quick: bool) -> dict[str, Any]:
    """Many agents, small and large updates."""
    with daemon(folder / "small") as server:
        result: dict[str, Any] = collection(server, agents=200 if quick else 1000, rounds=4)
        result["server_peak_mib"] = server.memory_mib()
    with daemon(folder / "large") as server:
        return result | uploads(server, folder, agents=20 if quick else 200, rounds=1)


def round_report(folder: Path, *, quick: bool, flower: bool) -> dict[str, Any]:
    """Rounds that cost nothing but themselves.

    While Flower's processes come up, which takes them much longer than a round of ours, base loads are
    counted; then Flower's warm rounds are held, then ours, each with nothing else at work.
    """
    nodes, rounds, ours = (1, 4, 60) if quick else (2, 4, 300)
    with ExitStack() as stack:
        aside = stack.enter_context(ThreadPoolExecutor(1))
        flying = (
            aside.submit(run_flower, stack, folder / "flown", nodes=nodes, rounds=rounds) if flower else None
        )
        server = stack.enter_context(daemon(folder / "daemon"))
        tables = prepare(folder, rounds=ours, processes=not quick)
        loads = loads_per_agent(server, folder / "real", agents=1 if quick else 2, rounds=4 if quick else 10)
        counted_at = time.time()
        theirs = flying.result() if flying is not None else None
        result: dict[str, Any] = empty_rounds(server, folder, tables, rounds=ours, processes=not quick)
        result |= {"server_peak_mib": server.memory_mib(), "base_loads_per_agent": max(loads)}
    result |= {"agents_share_a_process": quick, "speedup_vs_superlink": None}
    if theirs is not None:
        result |= {
            "superlink_round_ms": statistics.median(theirs.ms),
            "superlink_nodes": nodes,
            "superlink_rounds": len(theirs.ms),
            "superlink_round_ms_min": min(theirs.ms),
            "speedup_vs_superlink_worst": min(theirs.ms) / result["round_ms_p99"],
            "superlink_beside_other_work_s": max(0.0, counted_at - theirs.opened_at),
            "speedup_vs_superlink": statistics.median(theirs.ms) / result["round_ms_p50"],
        }
    return result


def main() -> None:
    """Print what was found, and the JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, agents in one process")
    parser.add_argument("--no-superlink", action="store_true", help="leave Flower's own processes out")
    parser.add_argument("--load", action="store_true", help="many agents instead of empty rounds")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that processes are ended
    began, busy = time.perf_counter(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="fedpeft-bench-") as name:
        if options.load:
            result = load_report(Path(name), quick=options.quick)
        else:
            result = round_report(Path(name), quick=options.quick, flower=not options.no_superlink)
    rounded = {key: round(value, 3) if isinstance(value, float) else value for key, value in result.items()}
    for key, value in rounded.items():
        print(f"  {key.replace('_', ' '):<26} {value}")
    print(f"  ({time.perf_counter() - began:.0f} s in all; load average {busy:.1f} at the start)")
    extra = {
        "tls": False,
        "load_average": round(busy, 1),
        "cores": os.cpu_count(),
        "seed": 0,
        "quick": options.quick,
    }
    print(json.dumps(rounded | extra | {"script": Path(__file__).name}))


if __name__ == "__main__":
    main()
