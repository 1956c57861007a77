"""Which modules of a classifier lie around its body: the head, whatever its architecture calls it."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["outer_modules"]

_CLASSIFIER = "ForSequenceClassification"


def outer_modules(model: nn.Module) -> tuple[str, ...]:
    """Return the names of what a classifier has beside its body, sorted; none of other models.

    BERT calls it classifier, Llama score, BART and T5 classification_head, XLNet sequence_summary and
    logits_proj.
    """
    if not type(model).__name__.endswith(_CLASSIFIER):
        return ()
    body: Any = getattr(model, "base_model_prefix", "")
    names = (
        name
        for name, child in model.named_children()
        if name != body and any(True for _ in child.parameters())
    )
    return tuple(sorted(names))
