"""Where generated text ends: one set of end tokens for training, scores and every folder that is written.

Rows end with the tokenizer's end token. A model's own generation settings may name others, as those of chat
models do, or the wrong one; what was trained to stop must stop here and at whoever loads the result. So the
set is the tokenizer's end token and those of the model, and it is what the model's settings say from loading
on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from fedpeft.models.quiet import quiet


def end_tokens(model: nn.Module, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids at which generation ends, the tokenizer's own first; empty where there is none."""
    settings: Any = getattr(model, "generation_config", None)
    own = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return tuple(dict.fromkeys([*own, *_ids(getattr(settings, "eos_token_id", None))]))


def settle_end_tokens(model: nn.Module, tokenizer: Tokenizer) -> None:
    """Write the set into the model's generation settings, which a saved model takes along."""
    settings: Any = getattr(model, "generation_config", None)
    ends = end_tokens(model, tokenizer)
    if settings is not None and ends and set(_ids(settings.eos_token_id)) != set(ends):
        settings.eos_token_id = ends[0] if len(ends) == 1 else list(ends)


def first_end_token(path: str) -> int | None:
    """Return the first end token that the settings of a model folder name, for tokenizers without one."""
    try:
        with quiet():
            found = GenerationConfig.from_pretrained(path, local_files_only=Path(path).is_dir())
    except Exception:  # no settings, which is no fault of the folder
        return None
    ids = _ids(found.eos_token_id)
    return ids[0] if ids else None


@torch.no_grad()
def generate_greedily(
    model: nn.Module,
    tokenizer: Tokenizer,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    max_new_tokens: int,
    pad_id: int,
) -> torch.Tensor:
    """Continue prompts with the likeliest token at each position, int64[B, new] without the prompts.

    Nothing of the model's own settings but its end tokens plays a part: a penalty for repetition or the like
    would score other answers than those that the model finds likeliest.

    Args:
        input_ids: int64[B, T], padded on the left.
        attention_mask: int64[B, T].
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    ends = end_tokens(base, tokenizer)
    plain = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_id,
        eos_token_id=list(ends) or None,
        bos_token_id=tokenizer.bos_token_id,
    )
    kept = base.generation_config
    base.generation_config = plain
    try:
        output: torch.Tensor = model.generate(  # type: ignore[operator]
            input_ids=input_ids, attention_mask=attention_mask, trust_remote_code=False
        )
    finally:
        base.generation_config = kept
    return output[:, input_ids.shape[1] :]


def save_settings(model: nn.Module, folder: Path) -> None:
    """Write the generation settings of a model that generates beside its adapter, for whoever loads that."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    settings = getattr(base, "generation_config", None)
    if settings is not None and base.can_generate():
        with quiet():
            settings.save_pretrained(folder)


def _ids(value: object) -> list[int]:
    """The ids of one, several or no end tokens."""
    if value is None:
        return []
    return [int(item) for item in value] if isinstance(value, list | tuple) else [int(value)]  # type: ignore[call-overload]
