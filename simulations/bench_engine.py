"""What the simulator costs beside the training itself.

Question: how much time and memory does orchestration add per client task, against Flower's Ray engine with
          the same apps, against a bare pool of processes, and against a bare training loop?
Command:  python simulations/bench_engine.py [--quick] [--no-ray]
Expected: under 1 ms with two workers and without, and at least 10x less than Ray, per task of a 1 MB
          adapter; at least 0.9x the plain loop's clients per second; 1,000 clients in the memory of a few.
Run time: about 30 s with --quick, plus Ray's start (10 s idle to over a minute on a busy machine).

All figures come from one run on one machine; only ratios travel. Tasks of the overhead part do no training
(`training.kind = "none"`): state down, update up, decoded, checked, folded. The bare pool is
`multiprocessing.Pool(2)`: the state's arrays pickled down, as many up, added in float64; no bounds, digests,
resumption or order that doesn't matter. `overhead_ms_per_task_worst` is the larger of our two. The last line
printed is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import psutil
import torch
from flwr.serverapp import Grid

from fedpeft.config.run_file import build_run, run_json
from fedpeft.data.collate import training_batches
from fedpeft.data.embedded import pretraining_rows
from fedpeft.flower.local_grid import LocalGrid
from fedpeft.flower.ray_engine import run_on_ray
from fedpeft.ledger import Checkpoint, Cohort
from fedpeft.ledger.records import ClientOutcome, Round
from fedpeft.participant.load_simulation import load_simulated_run
from fedpeft.participant.loaded_run import LoadedRun, set_loaded_run
from fedpeft.rounds.round_context import RoundContext
from fedpeft.rounds.round_loop import run_rounds
from fedpeft.runtime.randomness import stream
from fedpeft.training.first_order import train
from fedpeft.transport.roster import Roster, roll_call
from fedpeft.transport.tasks import Task
from fedpeft.updates.update import Arrays
from fedpeft.workers import InlineWorkers, ProcessWorkers, Workers

MIB = 2**20
RANK_OF_1_MB = 27  # LoRA on all linear layers of the embedded model: 266,112 parameters, 1.02 MiB


class Nowhere:
    """A journal and an observer that keep only the times at which rounds ended."""

    def __init__(self) -> None:
        self.ended: list[float] = []

    def open_round(self, number: int, draw: Callable[[], Cohort]) -> Cohort:
        """Nothing is kept."""
        return draw()

    def commit(self, checkpoint: Checkpoint) -> None:
        """Note the time."""
        self.ended.append(time.perf_counter())

    def round_started(self, number: int, asked: int) -> None:
        """Nothing."""

    def client_done(self, outcome: ClientOutcome) -> None:
        """Stop the benchmark if a client failed: its time would mean nothing."""
        if outcome.status != "folded":
            raise RuntimeError(f"{outcome.client}: {outcome.reason}")

    def round_done(self, row: Round) -> None:
        """Nothing."""


def tables(
    rows: Path, *, clients: int, rounds: int, cohort: int | None = None, **training: Any
) -> dict[str, Any]:
    """A run on the embedded model, without evaluation; 16 rows a client."""
    sampling = {"kind": "all"} if cohort is None else {"kind": "fixed", "cohort": cohort}
    return {
        "run": {"name": "bench", "rounds": rounds},
        "peft": {"method": "lora", "r": training.pop("rank", RANK_OF_1_MB), "target_modules": "all-linear"},
        "data": {
            "train": str(rows),
            "prompt": "{prompt}",
            "answer": "{answer}",
            "limit": 16 * clients,
            "max_length": 128,
            "partitioner": {"kind": "iid", "clients": clients},
        },
        "training": {"kind": "none"} | training,
        "federation": {"sampling": sampling},
    }


def write_rows(folder: Path) -> Path:
    """Rows for a thousand clients, from the embedded generator."""
    path = folder / "rows.jsonl"
    rows = pretraining_rows(np.random.default_rng(0), 16_000)
    path.write_text("".join(json.dumps({"prompt": row.prompt, "answer": row.answer}) + "\n" for row in rows))
    return path


def load_here(rows: Path, **options: Any) -> LoadedRun:
    """Load a run and make it this process's resident."""
    resident = load_simulated_run(build_run(tables(rows, **options), source="bench"))
    set_loaded_run(resident)
    return resident


def call_roll(grid: Grid, resident: LoadedRun, text: str = "") -> Roster:
    """Who is there."""
    return roll_call(grid, Task(resident.run_digest, 0, b"", text), expected=len(resident.data.clients))


def hold(
    grid: Grid, resident: LoadedRun, *, send_run: bool = False, roster: Roster | None = None
) -> list[float]:
    """Hold the run's rounds on a grid; the times at which they ended, after the start."""
    text = run_json(resident.run) if send_run else ""
    roster = roster or call_roll(grid, resident, text)
    nowhere = Nowhere()
    federation = RoundContext(
        run=resident.run,
        digest=resident.run_digest,
        grid=grid,
        roster=roster,
        space=resident.space,
        stages=resident.stages,
        journal=nowhere,
        observer=nowhere,
        evaluate=lambda state: None,
        run_json=text,
    )
    state = resident.space.initial_state(resident.parameters)
    nowhere.ended.append(time.perf_counter())
    run_rounds(federation, Checkpoint(resident.run_digest, 0, state, Round(round=0)))
    return nowhere.ended


def ms_per_task(ended: list[float], tasks: int) -> float:
    """Median over the warm rounds (the first one is left out)."""
    spans = sorted(after - before for before, after in itertools.pairwise(ended[1:]))
    return 1000 * spans[len(spans) // 2] / tasks


def overhead(resident: LoadedRun, make: Callable[[], Workers]) -> float:
    """Milliseconds per task on our grid."""
    workers = make()
    try:
        clients = len(resident.data.clients)
        return ms_per_task(hold(LocalGrid(clients, workers), resident), clients)
    finally:
        workers.close()


def overhead_on_ray(resident: LoadedRun) -> tuple[float, float]:
    """Milliseconds per warm task on Flower's engine, 2 actors; seconds until its first round ended."""
    clients, began = len(resident.data.clients), time.perf_counter()
    ended = run_on_ray(lambda grid: hold(grid, resident, send_run=True), clients, 2)
    return ms_per_task(ended, clients), ended[1] - began


def tree_mib() -> float:
    """Proportional set size of this process and its children: shared pages count once."""
    own = psutil.Process()
    tree = (own, *own.children(recursive=True))
    return float(sum(process.memory_full_info().pss for process in tree)) / MIB


def pool_task(state: Arrays) -> Arrays:
    """A client that computes nothing: its update is the state."""
    return state


def overhead_of_pool(resident: LoadedRun, rounds: int) -> float:
    """Milliseconds per task of the simplest alternative: two processes, pickled arrays, a sum."""
    state, clients = resident.space.initial_state(resident.parameters), len(resident.data.clients)
    ended = []
    with multiprocessing.get_context("fork").Pool(2) as pool:
        ended.append(time.perf_counter())
        for _ in range(rounds):
            total = {name: np.zeros(array.shape) for name, array in state.items()}
            for update in pool.imap_unordered(pool_task, itertools.repeat(state, clients)):
                for name, array in update.items():
                    total[name] += array
            ended.append(time.perf_counter())
    return ms_per_task(ended, clients)


class Peak:
    """Samples the tree's memory in the background."""

    def __enter__(self) -> Peak:
        self.mib, self._stop = tree_mib(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.mib = max(self.mib, tree_mib())


def memory(rows: Path, rounds: int) -> dict[str, float]:
    """1,000 clients, two workers that train: the peak with 100 clients in flight against that with 2.

    In flight is who was asked and has not been counted yet. Memory is that of all processes together.
    """
    training = {"kind": "first-order", "steps": 1, "batch_size": 4}
    resident = load_here(rows, clients=1000, rounds=rounds, cohort=100, **training)
    few = build_run(tables(rows, clients=1000, rounds=5 * rounds, cohort=2, **training), source="bench")
    workers = ProcessWorkers(2)
    try:
        grid, peaks = LocalGrid(1000, workers), []
        roster = call_roll(grid, resident)
        hold(grid, replace(resident, run=few), roster=roster)  # warm: libraries fill their own caches
        for run in (few, resident.run):
            with Peak() as peak:
                hold(grid, replace(resident, run=run), roster=roster)
            peaks.append(peak.mib)
    finally:
        workers.close()
    adapter = 4 * sum(parameter.numel() for parameter in resident.parameters.values()) / MIB
    return {"adapter_mib": adapter, "peak_2_mib": peaks[0], "peak_100_mib": peaks[1]}


def plain_loop(resident: LoadedRun, state: Arrays, rounds: int) -> float:
    """Clients per second of a loop that does only the training steps, one thread."""
    section, began, count = resident.run.training, time.perf_counter(), 0
    for round_ in range(1, rounds + 1):
        for client in resident.data.clients:
            resident.space.enter(resident.parameters, state)
            rows = resident.rows(resident.data.rows, client.train)
            rng = stream(0, "train", client.name, round_)
            train(resident.model, resident.parameters, rows, section, steps=section.steps or 1, rng=rng)
            count += 1
    return count / (time.perf_counter() - began)


def throughput(rows: Path, *, rounds: int, steps: int, pairs: int) -> tuple[float, float]:
    """Clients per second over the plain loop's, on one core and with two workers; medians of pairs."""
    resident = load_here(
        rows, clients=8, rounds=rounds, rank=8, kind="first-order", steps=steps, batch_size=16, lr=1e-3
    )
    state = resident.space.initial_state(resident.parameters)
    next(training_batches(resident.data.rows, resident.data.clients[0].train, 4, 1, stream(0, "warm")))
    plain_loop(resident, state, 1)
    one: list[float] = []
    two: list[float] = []
    kinds: tuple[tuple[list[float], Callable[[], Workers]], ...] = (
        (one, InlineWorkers),
        (two, lambda: ProcessWorkers(2)),
    )
    for _ in range(pairs):
        plain = plain_loop(resident, state, rounds)
        for results, make in kinds:
            workers = make()
            ended = hold(LocalGrid(8, workers), resident)
            workers.close()
            results.append(8 * rounds / (ended[-1] - ended[0]) / plain)
    return sorted(one)[pairs // 2], sorted(two)[pairs // 2]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-ray", action="store_true", help="leave Flower's engine out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        measure(options, write_rows(Path(folder)))


def measure(options: argparse.Namespace, rows: Path) -> None:
    """All parts, Ray last, and the line of JSON."""
    rounds, on_ray = (40, 15) if options.quick else (100, 40)
    resident = load_here(rows, clients=40, rounds=rounds)
    print(f"overhead per task: 40 clients, {rounds} rounds, no training")
    inline = overhead(resident, InlineWorkers)
    pool = overhead(resident, lambda: ProcessWorkers(2))
    bare = overhead_of_pool(resident, rounds)
    print(f"  in process {inline:.2f} ms, two worker processes {pool:.2f} ms, a bare pool {bare:.2f} ms")
    ratio, first_round = float("nan"), float("nan")
    use = memory(rows, 2 if options.quick else 5)
    extra = (use["peak_100_mib"] - use["peak_2_mib"]) / 98
    print(f"memory: {use['peak_2_mib']:.0f} MiB with 2 clients in flight, {use['peak_100_mib']:.0f} with 100")
    one, two = (
        throughput(rows, rounds=1, steps=4, pairs=3)
        if options.quick
        else throughput(rows, rounds=4, steps=8, pairs=5)
    )
    print(f"throughput: {one:.2f}x the plain loop on one core, {two:.2f}x with two workers")
    if not options.no_ray:
        resident = load_here(rows, clients=40, rounds=on_ray)
        began = time.perf_counter()
        ray_ms, first_round = overhead_on_ray(resident)
        ratio = ray_ms / pool
        print(f"  Flower's engine, 2 actors: {ray_ms:.1f} ms, first round after {first_round:.1f} s")
        print(f"  ({time.perf_counter() - began:.0f} s in all)")
    result = {
        "overhead_ms_per_task": round(pool, 3),
        "overhead_ms_per_task_inline": round(inline, 3),
        "overhead_ms_per_task_worst": round(max(inline, pool), 3),
        "overhead_ratio_vs_bare_pool": round(bare / pool, 2),
        "overhead_ratio_vs_ray": round(ratio, 1) if ratio == ratio else None,
        "ray_first_round_s": round(first_round, 1) if first_round == first_round else None,
        "clients_per_second_vs_plain_loop": round(one, 3),
        "clients_per_second_vs_plain_loop_2_workers": round(two, 3),
        "extra_mib_per_client_in_flight": round(extra, 2),
        "adapter_mib": round(use["adapter_mib"], 2),
        "clients": 1000,
        "seed": 0,
        "quick": options.quick,
        "script": Path(__file__).name,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
