"""What each direction of a round cost: the values before and after each stage, and the message."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import numpy as np

from fedpeft.ledger.records import ClientOutcome, TrafficStats
from fedpeft.rounds.downlink.state_steps import Step
from fedpeft.stages import Stage
from fedpeft.updates.update import Layout
from fedpeft.wire.codec import Envelope, encode

PLAIN = "plain"  # the values as the space makes them, before any stage
CHANGE_FORM = frozenset({"lossy", "mask"})  # roles of stages after which the values are other bytes


def header_bytes(envelope: Envelope) -> int:
    """What a message would weigh without values."""
    return len(encode(replace(envelope, arrays={}, encoded={})))


def upload_stats(
    stages: Sequence[Stage], layout: Layout, outcomes: Sequence[ClientOutcome], header: int
) -> TrafficStats | None:
    """The round's updates that were counted; None without one.

    Args:
        layout: of an update.
        header: see `header_bytes`.
    """
    counted = [outcome for outcome in outcomes if outcome.status == "folded"]
    if not counted:
        return None
    message = fmean(outcome.bytes_up for outcome in counted)
    return TrafficStats(
        stages=_sizes(stages, layout, message - header),
        message=message,
        distortion=_mean([outcome.distortion for outcome in counted]),
        cosine=_mean([outcome.cosine for outcome in counted]),
    )


def download_stats(
    stage: Stage | None, layout: Layout, outcomes: Sequence[ClientOutcome], step: Step
) -> TrafficStats | None:
    """The round's state on its way to clients that were sent it, and the step that the round made.

    Args:
        layout: of the state.
    """
    sizes = [outcome.bytes_down for outcome in outcomes if outcome.bytes_down]
    if not sizes:
        return None
    stages = () if stage is None else (stage,)
    coded = len(step.payload) if step.payload else None
    return TrafficStats(
        stages=_sizes(stages, layout, coded),
        message=fmean(sizes),
        distortion=step.distortion,
        cosine=step.cosine,
    )


def _sizes(stages: Sequence[Stage], layout: Layout, coded: float | None) -> tuple[tuple[str, float], ...]:
    """(stage, bytes of the values after it); stages that leave the values' form alone leave their size."""
    size: float = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in layout.values())
    sizes = [(PLAIN, float(size))]
    for stage in stages:
        if stage.role in CHANGE_FORM and coded is not None:
            size = coded
        sizes.append((stage.kind, float(size)))
    return tuple(sizes)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
