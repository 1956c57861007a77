"""What a transfer weighs in each direction: after each stage, at the socket, and next to dense ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from fedpeft.ledger.records import Round, Started, TrafficStats

Direction = Literal["up", "down"]
FP32, BF16 = 4, 2  # bytes per trained parameter


@dataclass(frozen=True, slots=True)
class TransferSummary:
    """One direction of a run. Sizes are bytes, means over the rounds that have them.

    `stages` is the values' size before the first stage ("plain") and after each one; `message` what went over
    the socket. `fp32` and `bf16` are what all trained parameters would have weighed. Distortion is the
    relative L2, with the cosine beside it; None where nothing was lost.
    """

    direction: Direction
    stages: tuple[tuple[str, float], ...]
    message: float
    fp32: float
    bf16: float
    distortion: float | None
    cosine: float | None

    @property
    def saving(self) -> float:
        """How many times smaller a message is than the parameters in bf16."""
        return self.bf16 / self.message if self.message else 0.0


def summarise_transfers(started: Started, rounds: Sequence[Round]) -> tuple[TransferSummary, ...]:
    """Up and down, as far as the rows know them."""
    entries = started.trainable_parameters
    found = []
    for direction in ("up", "down"):
        legs = [leg for row in rounds if (leg := traffic_stats_of(row, direction)) is not None]
        if legs:
            found.append(_journey(direction, legs, entries))
    return tuple(found)


def traffic_stats_of(row: Round, direction: Direction) -> TrafficStats | None:
    """The round's leg in that direction."""
    return row.up if direction == "up" else row.down


def _journey(direction: Direction, legs: Sequence[TrafficStats], entries: int) -> TransferSummary:
    names = [name for name, _ in legs[0].stages]
    same = [leg.stages for leg in legs if [name for name, _ in leg.stages] == names]
    return TransferSummary(
        direction=direction,
        stages=tuple((name, fmean(stages[place][1] for stages in same)) for place, name in enumerate(names)),
        message=fmean(leg.message for leg in legs),
        fp32=float(FP32 * entries),
        bf16=float(BF16 * entries),
        distortion=_mean([leg.distortion for leg in legs]),
        cosine=_mean([leg.cosine for leg in legs]),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
