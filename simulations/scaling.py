"""What a round costs a server, from measured constants and the virtual clock, up to a million devices.

Question: how do bytes, CPU time, memory and database rows of a round grow with the devices that take part,
          and what ends first?
Command:  python simulations/scaling.py [--agents 300]
Expected: everything grows in proportion; one server's processor ends first for small updates, its line for
          large ones, and its memory for sessions.
Run time: 2 minutes on two idle cores.

The constants are measured on a real daemon (`fedpeft server --insecure` on loopback), as CPU time of its
process: of rounds with many and with few agents (the cheapest of several, as other work on the machine makes
CPU time dearer too), so that what a round costs by itself is told apart from what an update costs; and over
the number of sessions and heartbeats. They hold for seed-scalar updates of about a kilobyte; larger ones cost
their bytes on top. What one server carries is then arithmetic: arrivals are drawn by the virtual clock that
simulations use (latency 0.1 s, lines of 1 MB/s, training of a lognormal minute with sigma 1), and served one
after the other at the measured cost. More than 20,000 devices are drawn as 20,000, each for several.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fedpeft.config.sections import ClockSection
from fedpeft.rounds.simulated_clock import VirtualClock
from simulations.bench_federation import Daemon, daemon, end_agents, run_on_loop, serve_run
from simulations.federation_load import Answers, Prepared, connect_agents, name_of

TICKS = os.sysconf("SC_CLK_TCK")
DRAWN = 20_000
CLOCK = ClockSection(examples_per_s=1.0, speed_sigma=1.0, bytes_per_s=1e6, latency_s=0.1)
EXAMPLES = 60  # at a median of one a second


@dataclass(frozen=True)
class Constants:
    """Of one machine.

    Attributes:
        update_cpu_ms: the daemon's for one update more, from the round's opening to its commit.
        round_cpu_ms: for a round without updates; the state's step and its checkpoint, mostly.
        session_kib: resident memory of an open session that waits.
        session_cpu_ms: of a session that begins, handshakes of TLS not included.
        beat_cpu_ms: of a heartbeat.
        row_bytes: what an update leaves in the database once it is counted.
        report_bytes: what it leaves in the round's record, of which the log keeps a copy.
        update_bytes: the size of the updates that were measured.
    """

    update_cpu_ms: float
    round_cpu_ms: float
    session_kib: float
    session_cpu_ms: float
    beat_cpu_ms: float
    row_bytes: float
    report_bytes: float
    update_bytes: int


@dataclass(frozen=True)
class Round:
    """A round in which `devices` take part, on one server."""

    devices: int
    up_mb: float
    cpu_s: float
    rows: int
    database_mb: float
    record_mb: float
    sessions_mib: float
    beats_cores: float
    devices_done_s: float
    server_done_s: float
    longest_wait_s: float


def cpu_s(server: Daemon) -> float:
    """CPU time of the daemon so far."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def measure(folder: Path, agents: int, rounds: int) -> Constants:
    """All constants, of one daemon."""
    with daemon(folder / "daemon") as server:
        base, began = server.memory_mib("VmRSS"), cpu_s(server)
        waiting = run_on_loop(connect_agents(server.address, agents, lambda task, index: (b"", b"")))
        session_cpu = cpu_s(server) - began
        session_mib = server.memory_mib("VmRSS") - base
        began, beats = cpu_s(server), 2
        time.sleep(15.0 * beats)
        beat_cpu = cpu_s(server) - began
        run_on_loop(end_agents(waiting))

        few = agents // 6
        small, _ = round_cpu_s(server, few, rounds, "few")
        database = measure_settled_bytes(server)
        large, size = round_cpu_s(server, agents, rounds, "many")
        update_cpu = (large - small) / (agents - few)
        ((record,),) = server.query(
            "SELECT avg(length(row)) FROM rounds JOIN runs ON id = run WHERE number > 0 AND name = 'many'"
        )
        grown = measure_settled_bytes(server) - database
    return Constants(
        update_cpu_ms=1000 * update_cpu,
        round_cpu_ms=1000 * (small - few * update_cpu),
        session_kib=1024 * session_mib / agents,
        session_cpu_ms=1000 * session_cpu / agents,
        beat_cpu_ms=1000 * beat_cpu / (agents * beats),
        row_bytes=grown / (agents * rounds) - 2 * record / agents,
        report_bytes=record / agents,
        update_bytes=size,
    )


def round_cpu_s(server: Daemon, agents: int, rounds: int, name: str) -> tuple[float, int]:
    """The daemon's CPU time of the cheapest round with so many updates, and the size of an update."""
    tables = serve_run(name, agents, rounds)
    tables |= {"peft": {"method": "full"}, "space": {"kind": "seed-scalars", "num_seeds": 384}}
    tables["training"] = {"kind": "zeroth-order", "rule": "zo-sgd", "steps": 1, "batch_size": 1, "lr": 1e-6}
    answers = Answers.of(tables)
    clients = run_on_loop(connect_agents(server.address, agents, Prepared(answers, agents, rounds)))
    marks = _marks(server, server.submit(tables, agents=agents), rounds)
    run_on_loop(end_agents(clients))
    cheapest = min(after - before for before, after in itertools.pairwise(marks))
    return cheapest, len(answers.train(name_of(0), 0, 1))


def _marks(server: Daemon, run: str, rounds: int) -> list[float]:
    """The daemon's CPU time when each round but the first had been closed."""
    marks: list[float] = []
    for number in range(1, rounds + 1):
        while not server.query(
            "SELECT 1 FROM rounds WHERE run = ? AND number = ? AND status = 'closed'", run, number
        ):
            server.status(run)
            time.sleep(0.002)
        marks.append(cpu_s(server))
    server.wait_for_end(run)
    return marks


def measure_settled_bytes(server: Daemon) -> int:
    """The database's size without the pages that are free."""
    ((pages,),) = server.query("PRAGMA page_count")
    ((free,),) = server.query("PRAGMA freelist_count")
    ((size,),) = server.query("PRAGMA page_size")
    return int((pages - free) * size)


def round_of(devices: int, known: Constants, heartbeat_s: float = 15.0) -> Round:
    """What a round of that size costs, and how long it lasts on the virtual clock."""
    cpu_ms = known.update_cpu_ms
    arrivals = arrivals_s(devices, known.update_bytes)
    each = devices / len(arrivals)
    done = longest = 0.0
    for arrival in arrivals:
        done = max(done, arrival) + each * cpu_ms / 1000
        longest = max(longest, done - arrival)
    return Round(
        devices=devices,
        up_mb=devices * known.update_bytes / 1e6,
        cpu_s=(known.round_cpu_ms + devices * cpu_ms) / 1000,
        rows=devices + 3,  # the updates, the round, its checkpoint, a line of the log
        database_mb=devices * (known.row_bytes + 2 * known.report_bytes) / 1e6,
        record_mb=devices * known.report_bytes / 1e6,
        sessions_mib=devices * known.session_kib / 1024,
        beats_cores=devices * known.beat_cpu_ms / 1000 / heartbeat_s,
        devices_done_s=arrivals[-1],
        server_done_s=done,
        longest_wait_s=longest,
    )


def arrivals_s(devices: int, update_bytes: int) -> Sequence[float]:
    """When updates arrive, by the virtual clock of a simulation, in order."""
    clock = VirtualClock(CLOCK, seed=0)
    fates = (
        clock.fate(name_of(index), 1, examples=EXAMPLES, bytes_down=update_bytes, bytes_up=update_bytes)
        for index in range(min(devices, DRAWN))
    )
    return sorted(fate.arrives_s for fate in fates)


def main() -> None:
    """Measure, and print the table; the last line is one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--agents", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedpeft-scaling-") as name:
        known = measure(Path(name), options.agents, options.rounds)
    for key, value in asdict(known).items():
        print(f"  {key.replace('_', ' '):<20} {value:,.3f}")
    table = [round_of(devices, known) for devices in (1_000, 10_000, 100_000, 1_000_000)]
    print("  " + "".join(f"{key.replace('_', ' '):>18}" for key in asdict(table[0])))
    for row in table:
        print("  " + "".join(f"{value:>18,.1f}" for value in asdict(row).values()))
    rounds = {"rounds": [asdict(row) for row in table]}
    print(json.dumps(asdict(known) | rounds | {"script": Path(__file__).name}))


if __name__ == "__main__":
    main()
