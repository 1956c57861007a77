"""Which rule of the zeroth-order family learns most from the same number of forward passes?

    python simulations/compare_zeroth.py                   (3 minutes, one core)
    python simulations/compare_zeroth.py --seeds 0 1 2
    python simulations/compare_zeroth.py --tune            (learning rates, on seed 100)
    python simulations/compare_zeroth.py --quick           (under a minute: one round)

Every line of `FAMILY` is the run file `zeroth_family.toml` with another rule. A client has 120 forward passes
a round, and steps are as many as that allows: a direction costs two (central difference), five with
"conservative" (which tries three places), and a pass that carries derivatives or gradients along counts as
three, since it has three matrix products for each one. `--tune` runs half the rounds with a third of the
table's rate, with the rate itself and with three times it, and names the best.

Expected: a markdown table with the held-out loss (nats per token) after the last round, mean over seeds with
the lowest and the highest, beside the pretrained model's. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import fedpeft
from fedpeft import Round, load_run
from fedpeft.training.zeroth_rules import RULES

RUN_FILE = Path(__file__).resolve().with_name("zeroth_family.toml")
PASSES = 120  # of one client in one round
TUNING_SEED = 100
FACTORS = (1 / 3, 1.0, 3.0)


@dataclass(frozen=True)
class Member:
    """A rule as it is compared; `keys` are further overrides of its training section."""

    rule: str
    lr: float
    queries: int = 1
    keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Local steps that the passes allow."""
        return PASSES // (RULES[self.rule].forwards * self.queries)

    def overrides(self, seed: int, rounds: int, lr: float) -> list[str]:
        """The run file's overrides."""
        training = {"rule": self.rule, "lr": repr(lr), "queries": self.queries, "steps": self.steps}
        changes = {f"training.{key}": value for key, value in {**training, **self.keys}.items()}
        changes |= {"run.seed": seed, "run.rounds": rounds, "evaluation.every": rounds}
        return [f"{key}={value}" for key, value in changes.items()]


FAMILY: Mapping[str, Member] = {
    "zo-sgd": Member("zo-sgd", 2e-4),
    "zo-sgd, 4 queries": Member("zo-sgd", 6e-4, queries=4),
    "sign": Member("sign", 1e-3),
    "conservative": Member("conservative", 1.3e-4),
    "momentum": Member("momentum", 2e-5),
    "adam": Member("adam", 1e-3),
    "forward-grad": Member("forward-grad", 2e-4),
    "block-wise": Member("block-wise", 6e-4),
    "sparse, density 0.25": Member("sparse", 6e-4),
    "hybrid, 3 of 5 layers below": Member(
        "hybrid",
        7e-5,
        keys={"layers_below": "3", "optimizer": "sgd", "lr_above": "0.3", "max_grad_norm": "1.0"},
    ),
}


def losses_of(member: Member, seed: int, rounds: int, lr: float) -> tuple[float, float]:
    """Held-out loss before and after."""
    run = load_run(RUN_FILE, member.overrides(seed, rounds, lr))
    with tempfile.TemporaryDirectory() as place:
        rows = fedpeft.simulate(run, out=Path(place) / "run").rows
    found = [row.evaluation for row in rows if isinstance(row, Round) and row.evaluation is not None]
    return found[0].scores["loss"].value, found[-1].scores["loss"].value


def tune(rounds: int) -> None:
    """Print the loss at each rate, and the best rate."""
    for name, member in FAMILY.items():
        tried = {}
        for factor in FACTORS:
            try:
                tried[member.lr * factor] = losses_of(member, TUNING_SEED, rounds, member.lr * factor)[1]
            except Exception as error:  # a rate that diverges is one that is not chosen
                print(f"{name} at {member.lr * factor:.2g}: {type(error).__name__}", flush=True)
        best = min(tried, key=lambda lr: tried[lr])
        shown = ", ".join(f"{lr:.2g}: {loss:.3f}" for lr, loss in tried.items())
        print(f"{name}: {shown}; best {best:.2g}", flush=True)


def compare(seeds: Sequence[int], rounds: int) -> dict[str, list[float]]:
    """Print the table; final losses by member."""
    finals: dict[str, list[float]] = {}
    before: list[float] = []
    print("| rule | directions a round | lr | held-out loss | replays in seed space | CPU s |")
    print("| --- | ---: | ---: | ---: | --- | ---: |")
    for name, member in FAMILY.items():
        began = time.process_time()
        pairs = [losses_of(member, seed, rounds, member.lr) for seed in seeds]
        before, finals[name] = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        rule, cpu_s = RULES[member.rule], (time.process_time() - began) / len(seeds)
        replays = "yes" if rule.replays else f"no: {rule.hindrance.split(',')[0]}"
        visits = member.steps * member.queries
        print(
            f"| {name} | {visits} | {member.lr:g} | {_spread(finals[name])} | {replays} | {cpu_s:.0f} |",
            flush=True,
        )
    print(
        f"\npretrained: {_spread(before)}; {len(seeds)} seeds, {rounds} rounds, {PASSES} passes a client"
        " and round"
    )
    return finals


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else mean


def main() -> None:
    """Compare, or tune."""
    parser = argparse.ArgumentParser(description="the zeroth-order family on equal forward passes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tune", action="store_true", help="search learning rates instead")
    parser.add_argument("--quick", action="store_true", help="one round")
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else load_run(RUN_FILE).run.rounds
    if arguments.tune:
        tune(max(1, rounds // 2))
        return
    finals = compare(arguments.seeds, rounds)
    print(json.dumps({name: [round(loss, 4) for loss in losses] for name, losses in finals.items()}))


if __name__ == "__main__":
    main()
