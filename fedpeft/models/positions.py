"""How many positions a model has: learned or precomputed tables end, rotary and relative positions don't."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from fedpeft.config.sections import PeftSection
from fedpeft.models.methods import METHODS

__all__ = ["usable_positions", "virtual_tokens"]

_TABLE = re.compile(
    r"wpe|pos_emb|positions?_embed(ding)?s?(_layer)?|positional_embeddings?|embed_positions|pos_encoding"
)
_ROWS_WITHOUT_OFFSET = (
    "embed_positions",
    "pos_encoding",
)  # buffers of fixed size: GPT-J's, CodeGen's, CTRL's


def usable_positions(model: nn.Module) -> int | None:
    """Return how many tokens a row may have, virtual and generated ones included; None: there is no limit.

    A table may begin behind an offset: RoBERTa's positions start after its padding index, OPT's and BART's
    after two rows that no token has. Only names and shapes are read, so a model on the meta device will do.
    """
    limits = [limit for name, module in model.named_modules() for limit in _limits(name, module)]
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) == "mpt":  # its bias by distance is a tensor of this length
        limits.append(int(config.max_seq_len))
    return min(limits, default=None)


def virtual_tokens(section: PeftSection) -> int:
    """Return how many positions the method puts before each row: those of prompts and prefixes, else 0."""
    method = METHODS.get(section.method)
    if method is None or "num_virtual_tokens" not in method.defaults:
        return 0
    given = section.options.get("num_virtual_tokens", method.defaults["num_virtual_tokens"])
    return given if isinstance(given, int) else 0


def _limits(name: str, module: nn.Module) -> list[int]:
    leaf = name.rpartition(".")[2]
    if isinstance(module, nn.Embedding) and _TABLE.fullmatch(leaf):
        return [module.num_embeddings - _offset(module)]
    buffers = module.named_buffers(recurse=False)
    own = [buffer.shape[0] for key, buffer in buffers if key in _ROWS_WITHOUT_OFFSET and buffer.dim() == 2]
    ids = getattr(module, "position_ids", None)  # shorter than its table where that has an offset
    if isinstance(ids, torch.Tensor) and any(_TABLE.fullmatch(key) for key, _ in module.named_children()):
        own.append(ids.shape[-1])
    return own


def _offset(table: nn.Embedding) -> int:
    """Rows at the beginning of a table that no position has."""
    if table.padding_idx is not None:
        return table.padding_idx + 1
    offset = getattr(table, "offset", 0)
    return offset if isinstance(offset, int) else 0
