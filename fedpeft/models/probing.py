"""Trying a model out on made-up rows, before it costs anybody anything."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fedpeft.errors import ModelError
from fedpeft.models.comparison import draw_token_rows, read_logits
from fedpeft.models.quiet import one_line, quiet

__all__ = ["refuse_leak", "try_out"]

_LEAK = 1e-4
"""An earlier logit that moves by more of the largest one reads later tokens; rounding moves it by 1e-6.
Bases that round activations round both rows alike, as they come in one batch."""


def refuse_leak(base: nn.Module, path: str) -> None:
    """Refuse a language model whose logits see the tokens that they are to predict, as an encoder's do.

    Args:
        path: as the run file names it.

    Raises:
        ModelError: other tokens at the end of a row move logits at its beginning.
    """
    rows = draw_token_rows(base)[:2]
    half = rows.shape[1] // 2
    rows[1, :half] = rows[0, :half]
    with quiet():
        first, second = read_logits(base, rows)[:, :half]
    moved, scale = float((first - second).abs().max()), float(first.abs().max())
    if moved > _LEAK * max(scale, 1e-6):
        kind = getattr(base.config, "model_type", "model")
        raise ModelError(
            f"model.path '{path}' is no decoder: its logits see later tokens, so that a {kind} would only"
            " learn to copy them; give a causal language model, or set model.task 'sequence-classification'"
        )


def try_out(model: nn.Module, method: str) -> None:
    """Compute once with what was attached.

    Raises:
        ModelError: it cannot; saying what stopped it.
    """
    parameter: Any = next(model.parameters())
    if parameter.device.type == "meta":
        return
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            read_logits(model, draw_token_rows(model)[:2])
    except Exception as error:  # tuners and models raise every kind
        raise ModelError(f"peft.method '{method}' cannot compute on this model: {one_line(error)}") from error
