"""Which way of averaging LoRA factors is best? The embedded tasks, eight clients of one rank or of several.

    python simulations/quality_lora_rules.py --out runs/lora-rules --seeds 0 1 2
    python simulations/quality_lora_rules.py --out runs/lora-rules --arms "fedit, rank 8" "flexlora, mixed"
    python simulations/quality_lora_rules.py --out runs/lora-rules --quick                  (one round)

Each client has rows of its own mix of tasks and takes 6 Adam steps on 8 rows in each of 6 rounds; LoRA is on
all linear layers, all clients are asked each round. Rows and steps are those of `fedpeft simulate` without
arguments. Each arm has a rate of its own: the best of 1.7e-3, 5e-3 and 1.5e-2 by the loss on the held-out
rows of seed 100, which the table does not show.

    rank 8   all clients train LoRA of rank 8
    rank 2   all clients train rank 2: what the smallest device of `mixed` can hold
    mixed    four clients of rank 8, two of rank 4, two of rank 2, all with lora_alpha = 2 r
    nf4      rank 8; half of the clients hold the base in NF4, the others in float32

Each arm, seed and rate leaves OUT/seed-SEED/ARM-RATE.json; what is there is not run again.

Expected: one markdown table, a line for each arm, means over seeds (lowest to highest, where there are
several): exact match on the clients' held-out rows after the last round, and the loss there; the aggregation
error, mean over rounds; bytes up, down and both ways per client and round. fedsa has no global model: each
client's own is scored on its own rows, so its line says something else than the others. The last line of
output is one JSON object with every run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fedpeft
from fedpeft import Finished, Round, Started, load_run
from simulations.experiment_cli import TUNING_SEED, best_rate, write_result

ROUNDS = 6
CLIENTS = 8
RATE = 5e-3
TABLES: Mapping[str, Any] = {
    "run": {"name": "lora-rules", "rounds": ROUNDS},
    "peft": {"method": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "data": {"max_length": 128, "partitioner": {"kind": "iid", "clients": CLIENTS}},  # rows come with clients
    "training": {"steps": 6, "batch_size": 8, "lr": RATE},
    "evaluation": {"metrics": ["exact-match"], "bootstrap": 2, "batch_size": 64},
}

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "rank 8": {},
    "rank 2": {"peft": {"r": 2, "lora_alpha": 4}},
    "mixed": {
        "groups": [
            {"clients": ["client-4", "client-5"], "peft": {"r": 4, "lora_alpha": 8}},
            {"clients": ["client-6", "client-7"], "peft": {"r": 2, "lora_alpha": 4}},
        ]
    },
    "nf4": {"groups": [{"clients": [f"client-{n}" for n in range(4, 8)], "model": {"quantization": "nf4"}}]},
}


@dataclass(frozen=True)
class Arm:
    """One line of the table: a rule, and who holds what."""

    rule: str
    shape: str

    @property
    def name(self) -> str:
        """As `--arms` finds it."""
        return f"{self.rule}, {self.shape}"


ARMS = (
    *(
        Arm(rule, "rank 8")
        for rule in ("fedit", "ffa", "rolora", "fedsa", "hetlora", "flexlora", "exact-residual", "flora")
    ),
    Arm("fedit", "rank 2"),
    *(Arm(rule, "mixed") for rule in ("hetlora", "flexlora", "exact-residual", "flora")),
    Arm("fedit", "nf4"),
)


@dataclass(frozen=True)
class Result:
    """One finished run.

    Attributes:
        exact_match: on the clients' held-out rows, after the last round; a share of one.
        loss: there.
        error: aggregation error, mean over rounds; None where it cannot be measured.
        last_error: of the last round.
        up: bytes of an update, mean over clients and rounds.
        down: bytes of a state, likewise.
        cpu_s: of this process, set-up included.
    """

    rule: str
    shape: str
    seed: int
    exact_match: float
    loss: float
    error: float | None
    last_error: float | None
    up: float
    down: float
    rounds: int
    trained: int
    cpu_s: float
    versions: Mapping[str, str]
    lr: float


def tables_of(arm: Arm, seed: int, rounds: int, lr: float) -> dict[str, Any]:
    """The arm's run file."""
    tables = json.loads(json.dumps(TABLES))
    tables["training"]["lr"] = lr
    tables["run"] |= {"seed": seed, "rounds": rounds}
    tables["federation"] = {"lora_rule": arm.rule}
    tables["evaluation"]["every"] = rounds
    if arm.rule == "ffa":
        tables["peft"]["method"] = "ffa-lora"
    for section, keys in SHAPES[arm.shape].items():
        tables[section] = {**tables[section], **keys} if isinstance(keys, Mapping) else keys
    return dict(tables)


def run(arm: Arm, seed: int, rounds: int, lr: float) -> Result:
    """Hold one run from start to end."""
    began = time.process_time()
    config = load_run(tables_of(arm, seed, rounds, lr), source=arm.name)
    with tempfile.TemporaryDirectory() as place:
        rows = fedpeft.simulate(config, out=Path(place) / "run").rows
    started = next(row for row in rows if isinstance(row, Started))
    done = [row for row in rows if isinstance(row, Round) and row.round]
    if not any(isinstance(row, Finished) for row in rows) or done[-1].evaluation is None:
        raise SystemExit(f"{arm.name}: ended after round {done[-1].round} of {rounds}, without a score")
    found = done[-1].evaluation
    errors = [row.aggregation.error for row in done if row.aggregation is not None]
    outcomes = [outcome for row in done for outcome in row.outcomes if outcome.status == "folded"]
    return Result(
        **asdict(arm),
        seed=seed,
        exact_match=found.scores["exact-match"].value,
        loss=found.scores["loss"].value,
        error=statistics.fmean(errors) if errors else None,
        last_error=errors[-1] if errors else None,
        up=statistics.fmean(outcome.bytes_up for outcome in outcomes),
        down=statistics.fmean(outcome.bytes_down for outcome in outcomes),
        rounds=rounds,
        trained=started.trainable_parameters,
        cpu_s=time.process_time() - began,
        versions=started.versions,
        lr=lr,
    )


def load_or_make(out: Path, arm: Arm, seed: int, rounds: int, lr: float) -> Result:
    """The arm's result of a seed with a rate; it is made first if there is none."""
    name = f"{arm.name.replace(', ', '-').replace(' ', '-')}-{lr:.2g}.json"
    path = out / f"seed-{seed}" / name
    if not path.is_file():
        result = run(arm, seed, rounds, lr)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_result(path, json.dumps(asdict(result)))
        shown = [cell([result]) for cell in COLUMNS.values()]
        print(f"seed {seed}  {arm.name}  {', '.join(shown)}", file=sys.stderr, flush=True)
    return Result(**json.loads(path.read_text()))


def rate_of(out: Path, arm: Arm, rounds: int) -> float:
    """The arm's best rate of three, by the loss on the held-out rows of the tuning seed."""
    return best_rate(RATE, lambda lr: load_or_make(out, arm, TUNING_SEED, rounds, lr).loss)


def _range(show: Callable[[float], str], values: Iterable[float | None]) -> str:
    """The mean of what there is, with lowest and highest of several."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    ends = f" ({show(min(known))} to {show(max(known))})" if len(known) > 1 else ""
    return show(statistics.fmean(known)) + ends


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _kib(value: float) -> str:
    return f"{value / 1024:,.0f}"


def _small(value: float) -> str:
    return f"{value:.3f}" if value >= 1e-3 else f"{value:.0e}"


COLUMNS: Mapping[str, Callable[[Sequence[Result]], str]] = {
    "rate": lambda several: f"{several[0].lr:.2g}",
    "exact match, %": lambda several: _range(_percent, (one.exact_match for one in several)),
    "loss": lambda several: _range("{:.3f}".format, (one.loss for one in several)),
    "aggregation error": lambda several: _range(_small, (one.error for one in several)),
    "KiB up": lambda several: _kib(statistics.fmean(one.up for one in several)),
    "KiB down": lambda several: _kib(statistics.fmean(one.down for one in several)),
    "KiB both ways": lambda several: _kib(statistics.fmean(one.up + one.down for one in several)),
    "CPU, s": lambda several: f"{statistics.fmean(one.cpu_s for one in several):.0f}",
}


def table(results: Iterable[Result]) -> str:
    """The results as markdown."""
    cells: dict[Arm, list[Result]] = {}
    for result in results:
        cells.setdefault(Arm(result.rule, result.shape), []).append(result)
    lines = [
        f"| rule | clients | seeds | {' | '.join(COLUMNS)} |",
        f"| --- | --- | ---: |{' ---: |' * len(COLUMNS)}",
    ]
    for arm in ARMS:
        if arm in cells:
            shown = " | ".join(cell(cells[arm]) for cell in COLUMNS.values())
            lines.append(f"| {arm.rule} | {arm.shape} | {len(cells[arm])} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, one arm after another, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=[arm.name for arm in ARMS], metavar="ARM")
    parser.add_argument("--quick", action="store_true", help="one round, one rate")
    given = parser.parse_args()
    rounds = 1 if given.quick else ROUNDS
    arms = [arm for arm in ARMS if given.arms is None or arm.name in given.arms]
    rates = {arm: RATE if given.quick else rate_of(given.out, arm, rounds) for arm in arms}
    results = [load_or_make(given.out, arm, seed, rounds, rates[arm]) for seed in given.seeds for arm in arms]
    print(table(results))
    print(json.dumps({"runs": [asdict(result) for result in results]}))


if __name__ == "__main__":
    main()
