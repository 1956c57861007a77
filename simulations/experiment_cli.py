"""What scripts that compare arms over seeds share: options, a rate of each arm's own, cells of tables."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

TUNING_SEED = 100
"""Rates are chosen on this seed, which no table reports."""
RATE_FACTORS = (1 / 3, 1.0, 3.0)
"""Each arm tries its run file's rate times these."""


def best_rate(rate: float, loss_of: Callable[[float], float]) -> float:
    """Return the rate with the lowest loss of `rate` times each of `RATE_FACTORS`.

    Args:
        loss_of: the loss of a run on `TUNING_SEED` with a rate; NaN or infinity where it diverged.

    Raises:
        SystemExit: no rate of the three has a loss that is a number.
    """
    losses = {rate * factor: loss_of(rate * factor) for factor in RATE_FACTORS}
    numbers = {tried: loss for tried, loss in losses.items() if math.isfinite(loss)}
    if not numbers:
        raise SystemExit(f"no rate of {', '.join(f'{tried:.2g}' for tried in losses)} has a finite loss")
    return min(numbers, key=lambda tried: numbers[tried])


def options(description: str | None, *, quick: str, arms: bool = True) -> argparse.ArgumentParser:
    """The command line that they have in common.

    Args:
        description: the script's own documentation.
        quick: what `--quick` leaves of the comparison.
        arms: whether some of the arms can be chosen.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="for every arm: data.train=FILE"
    )
    if arms:
        parser.add_argument(
            "--arms",
            metavar="TEXT",
            nargs="+",
            default=[],
            help="run only arms whose names have one of these; the table shows all that there is",
        )
    return parser


def seeds_of(arguments: argparse.Namespace) -> list[int]:
    """The seeds to run: those that were asked for, or one."""
    return [0] if arguments.quick else [int(seed) for seed in arguments.seeds.split(",")]


def is_wanted(arm: str, arguments: argparse.Namespace) -> bool:
    """Whether an arm was asked for."""
    return not arguments.arms or any(text in arm for text in arguments.arms)


def percent(shares: Sequence[float], digits: int = 1) -> str:
    """Shares of 1 as a mean in percent, with lowest and highest of several; a dash for none."""
    if not shares:
        return "–"
    values = [100 * share for share in shares]
    ends = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}%{ends}"


def write_result(path: Path, text: str) -> None:
    """Write a result whole or not at all, so that what a stopped script left is not taken for one."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)
