"""Random models, small enough for every test, built in code."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

VOCABULARY = 96
LABELS = 3
TASKS = {
    "llama": "causal-lm",
    "mixtral": "causal-lm",
    "bert": "sequence-classification",
    "llama-classifier": "sequence-classification",
}


def tiny_base(kind: str, seed: int = 0) -> nn.Module:
    """Build a frozen two-layer model: "llama" (tied, no biases), "mixtral" (experts), "llama-classifier"
    or "bert".
    """
    llama = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        tie_word_embeddings=True,
        num_labels=LABELS,
    )
    mixtral = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    bert = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        num_labels=LABELS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = {
            "llama": lambda: LlamaForCausalLM(llama),
            "mixtral": lambda: MixtralForCausalLM(mixtral),
            "llama-classifier": lambda: LlamaForSequenceClassification(llama),
            "bert": lambda: BertForSequenceClassification(bert),
        }[kind]()
        # Norm weights of exactly one and biases of exactly zero would hide mistakes.
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model.requires_grad_(False).eval()


def batch(kind: str) -> dict[str, torch.Tensor]:
    """Return four rows of twelve tokens, with the labels of the model's task."""
    ids = torch.randint(1, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids if TASKS[kind] == "causal-lm" else torch.tensor([0, 1, 2, 0])}


def logits(model: nn.Module, kind: str) -> torch.Tensor:
    """Return the logits over `batch(kind)`, in evaluation mode."""
    with torch.no_grad():
        out: torch.Tensor = model.eval()(input_ids=batch(kind)["input_ids"]).logits
    return out


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of the words w0, w1 ... with an unknown and an end token, and no padding token."""
    words = {"<unk>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def saved(kind: str, folder: Path) -> Path:
    """Save a tiny model with its tokenizer the Hugging Face way."""
    model = tiny_base(kind)
    model.save_pretrained(folder)  # type: ignore[operator]  # transformers is untyped
    tiny_tokenizer().save_pretrained(folder)
    return folder
