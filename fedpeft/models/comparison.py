"""Whether what was written is the model that was trained: logits of both on the same made-up rows.

An adapter's folder is not the trained model: others make that model again from it and a base. A start that is
drawn anew, weights that were tied, or an option that the folder doesn't hold make another model, and every
number in a report would be of one that nobody has. Models are compared by what they compute, so no kind of
difference has to be known beforehand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fedpeft.errors import ModelError
from fedpeft.models.device import device_of
from fedpeft.models.positions import usable_positions
from fedpeft.models.quantization import quantization_of

__all__ = ["bytes_of_copy", "draw_token_rows", "read_logits", "refuse_difference"]

_ROWS, _TOKENS, _FIRST = 4, 12, 3
_EXACT, _COARSE = 1e-4, 5e-2
"""Largest differences, relative to the largest logit (at least 1): of float32 models, whose sums may be taken
in another order, and of those that round activations or weights to few bits."""


def draw_token_rows(model: nn.Module) -> torch.Tensor:
    """Return token ids [rows, tokens] for a model, drawn evenly over its vocabulary, the same at each call.

    Rows end with the end token where the model has one: some classifiers read off there.
    """
    base = _base_of(model)
    vocabulary = int(base.get_input_embeddings().weight.shape[0])
    limit = usable_positions(base)
    tokens = _TOKENS if limit is None else max(2, min(_TOKENS, limit - _virtual(model)))
    ends = base.config.eos_token_id
    special = {base.config.pad_token_id, *(ends if isinstance(ends, list) else [ends])}
    allowed = [token for token in range(min(_FIRST, vocabulary - 1), vocabulary) if token not in special]
    drawn = torch.randint(len(allowed), (_ROWS, tokens), generator=torch.Generator().manual_seed(0))
    rows = torch.tensor(allowed)[drawn]
    end = ends[0] if isinstance(ends, list) and ends else ends
    if isinstance(end, int) and 0 <= end < vocabulary:
        rows[:, -1] = end
    return rows


def read_logits(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Return the model's logits on `rows`, float32 on the CPU, without dropout; its mode stays."""
    training, ids = model.training, rows.to(device_of(model))
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    model.train(training)
    return logits.float().cpu()


def refuse_difference(
    model: nn.Module, trained: torch.Tensor, found: torch.Tensor, *, what: str, keep: str
) -> None:
    """Refuse a model that computes something else than the trained one.

    Args:
        model: either of the two; its dtype says how close they must be.
        trained, found: logits of the trained model and of what was written.
        what: names what was written.
        keep: says what is still there.

    Raises:
        ModelError: the logits differ, or one has other places than the other that are no numbers.
    """
    low = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    coarse = low or quantization_of(_base_of(model)) == "int8"
    if trained.shape == found.shape and torch.equal(trained.isfinite(), found.isfinite()):
        fine = trained.isfinite()
        off = float((trained - found)[fine].abs().max()) if fine.any() else 0.0
        scale = max(1.0, float(trained[fine].abs().max()) if fine.any() else 0.0)
        if off <= (_COARSE if coarse else _EXACT) * scale:
            return
        how = f"its logits are off by {off:.3g} (largest: {scale:.3g})"
    else:
        how = "its logits have another shape, or are no numbers in other places"
    raise ModelError(f"{what} is not the model that was trained: {how}; {keep}")


def bytes_of_copy(model: nn.Module) -> int:
    """Return the bytes that another copy of a model takes."""
    return sum(parameter.nbytes for parameter in model.parameters())


def _base_of(model: nn.Module) -> Any:
    wrapped: Any = model
    return wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped


def _virtual(model: nn.Module) -> int:
    configs: Any = getattr(model, "peft_config", {})
    return sum(int(getattr(config, "num_virtual_tokens", 0) or 0) for config in configs.values())
