"""Per-example columns of a model on rows, computed batch by batch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedpeft.data.collate import collate, prompt_batch
from fedpeft.evaluation.metrics import METRICS, Column
from fedpeft.models.base_model import Tokenizer
from fedpeft.models.generation import generate_greedily
from fedpeft.training.first_order import Rows
from fedpeft.training.losses import SCORES

_QUIET = ("absl",)  # rouge_score announces its tokenizer there


@torch.no_grad()
def score(
    model: nn.Module,
    tokenizer: Tokenizer,
    rows: Rows,
    batches: Iterable[NDArray[np.int64]],
    metrics: Sequence[str],
    *,
    max_new_tokens: int,
) -> dict[str, Column]:
    """Columns over the rows of `batches`, in their order.

    `exact` needs no generation: greedy decoding yields the answer if and only if, fed the answer itself, the
    model's argmax at every position is the next answer token. (A tie in the argmax is broken alike in both.)

    Returns:
        float64[N] columns: index (row number), nll, tokens, correct, exact, and rouge_l where asked.
    """
    device = next(model.parameters()).device
    generates = any(METRICS[name].generates for name in metrics)
    parts: dict[str, list[Column]] = {name: [] for name in ("index", "nll", "tokens", "correct", "exact")}
    if generates:
        parts["rouge_l"] = []
    for indices in batches:
        batch = collate(rows.encoded, indices, rows.pad_id, task=rows.task)
        logits = model(
            input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device)
        ).logits
        scores = SCORES[rows.task](logits, batch.labels.to(device))
        parts["index"].append(indices.astype(np.float64))
        parts["nll"].append(scores.nll.numpy())
        parts["tokens"].append(scores.tokens.numpy())
        parts["correct"].append(scores.correct.numpy())
        parts["exact"].append((scores.correct == scores.tokens).double().numpy())
        if generates:
            texts = generate(model, tokenizer, rows, indices, max_new_tokens=max_new_tokens)
            parts["rouge_l"].append(_rouge_l(rows, indices, texts))
    return {name: np.concatenate(values) if values else np.zeros(0) for name, values in parts.items()}


@torch.no_grad()
def generate(
    model: nn.Module, tokenizer: Tokenizer, rows: Rows, indices: NDArray[np.int64], *, max_new_tokens: int
) -> list[str]:
    """Greedy continuations of the rows' prompts, as text without special tokens.

    Nothing can go on from nothing: a row without a prompt, where the tokenizer puts no token before it,
    has an empty text.
    """
    device = next(model.parameters()).device
    begun = rows.encoded.answer_start[indices] > 0
    if not begun.all():
        texts = iter(generate(model, tokenizer, rows, indices[begun], max_new_tokens=max_new_tokens))
        return [next(texts) if some else "" for some in begun]
    if not len(indices):
        return []
    prompts = prompt_batch(rows.encoded, indices, rows.pad_id)
    new = generate_greedily(
        model,
        tokenizer,
        prompts.input_ids.to(device),
        prompts.attention_mask.to(device),
        max_new_tokens=max_new_tokens,
        pad_id=rows.pad_id,
    )
    return [str(text) for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def _rouge_l(rows: Rows, indices: NDArray[np.int64], texts: Sequence[str]) -> Column:
    """ROUGE-L F1 (Lin 2004) by the rouge-score library, with stemming off."""
    from rouge_score.rouge_scorer import RougeScorer

    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    scorer = RougeScorer(["rougeL"])
    answers = rows.encoded.answers
    references = [answers[int(index)] if answers is not None else "" for index in indices]
    return np.array(
        [scorer.score(ref, text)["rougeL"].fmeasure for ref, text in zip(references, texts, strict=True)]
    )
