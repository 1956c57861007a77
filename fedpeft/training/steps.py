"""How much work a round asks of a client; no torch needed to know it."""

from __future__ import annotations

import math

from fedpeft.config.sections import TrainingSection


def local_steps(section: TrainingSection, rows: int) -> int:
    """Optimiser steps that one round asks of a client with so many rows."""
    if section.steps is not None:
        return section.steps
    return max(1, math.ceil(section.epochs * rows / (section.batch_size * section.gradient_accumulation)))


def examples_per_round(section: TrainingSection, rows: int) -> int:
    """Rows that a client reads in one round, counted as often as they are read."""
    per_batch = min(section.batch_size, rows)
    return local_steps(section, rows) * section.gradient_accumulation * per_batch
