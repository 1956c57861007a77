"""How much sooner is a loss reached when nobody waits for slow clients? Buffered against synchronous rounds.

    python simulations/quality_async.py --out runs/async           (25 minutes of CPU time, one core)
    python simulations/quality_async.py --out runs/async --quick   (1 minute: one seed, a few rounds)

Shakespeare by role on stories260K, LoRA, 64 clients; their speeds are lognormal, about ten times from the
slowest to the quickest (each seed's own ratio is printed). At most 16 clients work at a time in every arm,
and every arm counts as many updates. Time is virtual: latency, transfer and training, by each client's speed.
A seed decides the split of rows, the speeds, who is asked, and the batches. Arms:

    synchronous    16 clients a round, and the round waits for the slowest
    over-selected  16 are asked, and the quickest 11 are waited for
    buffered       fedbuff_shakespeare.toml
    constant       the same with all staleness weights 1
    scalars-sync   all parameters by common-direction seed-scalars (zeroth order), synchronous
    scalars        the same in buffered rounds

Each arm and seed leaves OUT/ARM-SEED.json; what is there is not run again. Settings were chosen on seed 100.
Printed at the end: for each arm the virtual time, the updates and the rounds that it takes to each goal, mean
over seeds (lowest to highest); goals are losses on the way of the synchronous run of the same seed and kind.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fedpeft.config.run_file import build_run
from fedpeft.config.sections import RunConfig
from fedpeft.ledger import RunFolder
from fedpeft.ledger.records import Round, Started, parse_row
from fedpeft.planning.preflight import refuse_problems
from fedpeft.reporting.progress import make_progress
from fedpeft.rounds.simulated_clock import VirtualClock
from fedpeft.simulation.engine import simulate

HERE = Path(__file__).resolve().parent
SEEDS = (0, 1, 2)
CONCURRENCY, ROUNDS = 16, 12  # of synchronous rounds
UPDATES = CONCURRENCY * ROUNDS
SHARES = (0.5, 0.8, 0.9, 0.95)  # goals: so much of the synchronous run's way from first to lowest loss

Table = Mapping[str, Any]
SYNCHRONOUS: Table = {
    "run": {"rounds": ROUNDS},
    "federation": {"sampling": {"kind": "fixed", "cohort": CONCURRENCY}},
    "evaluation": {"every": 1},
}
SCALARS: Table = {
    "peft": {"method": "full"},
    "training": {"kind": "zeroth-order", "lr": 2e-4, "radius": 1e-3, "steps": 8, "batch_size": 8},
    "space": {"kind": "seed-scalars", "mode": "common", "num_seeds": 8},
}
ARMS: Mapping[str, tuple[bool, Sequence[Table]]] = {  # whether buffered; tables laid over the run file's
    "synchronous": (False, [SYNCHRONOUS]),
    "over-selected": (
        False,
        [
            SYNCHRONOUS,
            {
                "run": {"rounds": UPDATES // 11},
                "federation": {"sampling": {"kind": "fixed", "cohort": 11}, "over_selection": 0.4},
            },
        ],
    ),
    "buffered": (True, []),
    "constant": (True, [{"federation": {"buffer": {"staleness_weight": {"kind": "constant"}}}}]),
    "scalars-sync": (False, [SYNCHRONOUS, SCALARS]),
    "scalars": (True, [SCALARS]),
}
REFERENCE = {"scalars-sync": "scalars-sync", "scalars": "scalars-sync"}  # default: synchronous
QUICK: Table = {"data": {"max_length": 32}, "evaluation": {"every": 1}}


@dataclass(frozen=True)
class Point:
    """Where a run stood: virtual seconds, updates and rounds so far, and the loss on all held-out rows."""

    virtual_s: float
    updates: int
    round: int
    loss: float


@dataclass(frozen=True)
class Result:
    """One arm with one seed.

    Attributes:
        speed_ratio: of the quickest to the slowest client.
        staleness: counts by staleness, all rounds; empty for synchronous arms.
        given_up: trainings that were asked for and came to nothing.
    """

    arm: str
    seed: int
    curve: list[Point]
    speed_ratio: float
    staleness: list[int]
    given_up: int
    cpu_s: float
    versions: dict[str, str]

    def first_reaching(self, goal: float) -> Point | None:
        """The first measured point at or below a loss."""
        return next((point for point in self.curve if point.loss <= goal), None)


def run_of(arm: str, seed: int, quick: bool, further: Sequence[Table] = ()) -> RunConfig:
    """The run of an arm."""
    buffered, changes = ARMS[arm]
    file = HERE / "fedbuff_shakespeare.toml"
    tables = tomllib.loads(file.read_text())
    if not buffered:
        del tables["federation"]["mode"], tables["federation"]["buffer"]
    for change in (*changes, *further, {"run": {"seed": seed}}, QUICK if quick else {}):
        tables = overlay(tables, change)
    if quick:
        tables["run"]["rounds"] = 8 if buffered else 2
    run = build_run(tables, source=arm, folder=HERE)
    refuse_problems(run, source=arm)
    return run


def overlay(tables: Table, change: Table) -> dict[str, Any]:
    """Tables with some keys replaced; a table of another kind replaces the whole one."""
    result = dict(tables)
    for key, value in change.items():
        old = result.get(key)
        whole = isinstance(value, Mapping) and value.keys() & {"kind", "method"}
        nested = isinstance(value, Mapping) and isinstance(old, Mapping) and not whole
        result[key] = overlay(old, value) if nested and isinstance(old, Mapping) else value
    return result


def run_arm(arm: str, seed: int, out: Path, quick: bool) -> Result:
    """An arm, by `fedpeft simulate`'s own engine."""
    began, run = time.process_time(), run_of(arm, seed, quick)
    with RunFolder.create(out / "runs" / f"{arm}-{seed}", run, force=True) as folder:
        with make_progress("quiet") as progress:
            simulate(folder, workers=1, engine="local", progress=progress)
        rows = [parse_row(line) for line in (folder.path / "metrics.jsonl").read_bytes().splitlines()]
    started = next(row for row in rows if isinstance(row, Started))
    rounds = [row for row in rows if isinstance(row, Round)]
    outcomes = [outcome for row in rounds for outcome in row.outcomes]
    counts = [0] * max((len(row.staleness) for row in rounds), default=0)
    for row in rounds:
        for age, count in enumerate(row.staleness):
            counts[age] += count
    return Result(
        arm,
        seed,
        list(_curve(rounds)),
        _speed_ratio(run, list(started.clients)),
        counts,
        sum(outcome.status != "folded" for outcome in outcomes),
        time.process_time() - began,
        dict(started.versions),
    )


def _curve(rounds: Sequence[Round]) -> Iterator[Point]:
    now_s, updates = 0.0, 0
    for row in rounds:
        now_s += row.virtual_s or 0.0
        updates += sum(outcome.status == "folded" for outcome in row.outcomes)
        if row.evaluation is not None:
            yield Point(now_s, updates, row.round, row.evaluation.scores["loss"].value)


def _speed_ratio(run: RunConfig, clients: Sequence[str]) -> float:
    if run.federation.clock is None:
        raise ValueError("the run file has no virtual clock")
    clock = VirtualClock(run.federation.clock, run.run.seed)
    speeds = [clock.examples_per_s(client) for client in clients]
    return max(speeds) / min(speeds)


def goals_of(synchronous: Result) -> list[float]:
    """Losses on the way of the synchronous run: shares of what it gains."""
    first, best = synchronous.curve[0].loss, min(point.loss for point in synchronous.curve)
    return [first - share * (first - best) for share in SHARES]


def spread(values: Sequence[float | None], digits: int = 0) -> str:
    """Mean and range; "never" where a run did not get there."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return f"never ({len(values) - len(known)} of {len(values)})"
    ends = f" ({min(known):.{digits}f} to {max(known):.{digits}f})" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.{digits}f}{ends}"


def row(*cells: object) -> str:
    """One line of a markdown table."""
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def table(results: Mapping[tuple[str, int], Result], seeds: Sequence[int]) -> Iterator[str]:
    """Virtual seconds to each goal, and how much sooner than synchronous rounds."""
    names = [f"{share:.0%} of the gain" for share in SHARES]
    yield row("arm", *names, "sooner, at the last", "updates to the last", "mean staleness", "given up")
    yield row("---", *["---:"] * (len(names) + 4))
    for arm in ARMS:
        found = [results[arm, seed] for seed in seeds]
        reference = [results[REFERENCE.get(arm, "synchronous"), seed] for seed in seeds]
        goals = [goals_of(result) for result in reference]
        hits = [[r.first_reaching(goal) for goal in each] for r, each in zip(found, goals, strict=True)]
        bases = [result.first_reaching(each[-1]) for result, each in zip(reference, goals, strict=True)]
        factors = [
            base.virtual_s / last.virtual_s if base is not None and last is not None else None
            for base, last in zip(bases, (hit[-1] for hit in hits), strict=True)
        ]
        yield row(
            arm,
            *(spread([_seconds(hit[place]) for hit in hits]) for place in range(len(names))),
            spread(factors, 1),
            spread([_updates(hit[-1]) for hit in hits]),
            spread([_mean_staleness(result) for result in found], 1),
            spread([float(result.given_up) for result in found]),
        )


def _seconds(point: Point | None) -> float | None:
    return None if point is None else point.virtual_s


def _updates(point: Point | None) -> float | None:
    return None if point is None else point.updates


def _mean_staleness(result: Result) -> float:
    total = sum(result.staleness)
    return sum(age * count for age, count in enumerate(result.staleness)) / total if total else 0.0


def one(arm: str, seed: int, out: Path, quick: bool) -> Result:
    """An arm with a seed: from its file, or run now."""
    file = out / f"{arm}-{seed}.json"
    if file.exists():
        read = json.loads(file.read_text())
        return Result(**{**read, "curve": [Point(**point) for point in read["curve"]]})
    out.mkdir(parents=True, exist_ok=True)
    result = run_arm(arm, seed, out, quick)
    file.write_text(json.dumps(asdict(result), indent=1))
    return result


def main() -> None:
    """Run what is missing, print the table and one JSON object."""
    parser = argparse.ArgumentParser(description="time to a loss, buffered against synchronous rounds")
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--quick", action="store_true", help="one seed, a few rounds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds = SEEDS[:1] if arguments.quick else SEEDS
    results = {(arm, seed): one(arm, seed, arguments.out, arguments.quick) for arm in ARMS for seed in seeds}
    ratios = [f"{results['synchronous', seed].speed_ratio:.1f}" for seed in seeds]
    print(f"quickest over slowest client, by seed: {', '.join(ratios)}\n")
    print("\n".join(table(results, seeds)))
    final = {f"{arm}-{seed}": round(result.curve[-1].loss, 4) for (arm, seed), result in results.items()}
    print(json.dumps({"final_loss": final}))


if __name__ == "__main__":
    main()
