"""Whether a model has positions for the longest row, with what is put before it and generated after it."""

from __future__ import annotations

from torch import nn

from fedpeft.config.sections import PeftSection, RunConfig
from fedpeft.errors import ModelError
from fedpeft.evaluation.metrics import METRICS
from fedpeft.models.positions import usable_positions, virtual_tokens


def refuse_long_rows(run: RunConfig, peft: PeftSection, base: nn.Module) -> None:
    """Refuse rows, virtual tokens and generated text that reach beyond the model's table of positions.

    Raises:
        ModelError: with what may be set instead.
    """
    limit = usable_positions(base)
    if limit is None:
        return
    before, after = virtual_tokens(peft), _count_generated(run)
    if before + run.data.max_length + after <= limit:
        return
    parts = [f"data.max_length {run.data.max_length}"]
    parts += [f"{before} virtual tokens (peft.num_virtual_tokens)"] if before else []
    parts += [f"{after} generated ones (evaluation.max_new_tokens)"] if after else []
    left = limit - before - after
    advice = f"set data.max_length to {left} or less" if left >= 2 else "set these lower"
    raise ModelError(f"the model has {limit} positions, fewer than {' and '.join(parts)} take; {advice}")


def _count_generated(run: RunConfig) -> int:
    """Tokens that metrics let the model write behind a prompt."""
    asked = (METRICS[name] for name in run.evaluation.metrics if name in METRICS)
    return run.evaluation.max_new_tokens if any(metric.generates for metric in asked) else 0
