"""A run small enough to be made many times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch


def tiny_tables() -> dict[str, Any]:
    """Four clients, three rounds of two steps, with dropout so that randomness matters."""
    return {
        "run": {"name": "tiny", "rounds": 3},
        "peft": {"method": "lora", "r": 2, "lora_dropout": 0.1},
        "data": {
            "limit": 64,
            "test_limit": 16,
            "max_length": 128,
            "partitioner": {"kind": "iid", "clients": 4},
        },
        "training": {"steps": 2, "batch_size": 8, "lr": 7e-3},
        "evaluation": {"bootstrap": 20, "metrics": ["exact-match"]},
    }


@pytest.fixture
def tables() -> dict[str, Any]:
    """See `tiny_tables`; a copy that a test may change."""
    return tiny_tables()


@pytest.fixture
def tiny_bert(tmp_path: Path) -> str:
    """The folder of a random two-layer BERT with a word-piece tokenizer of bytes."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path / "bert"
    folder.mkdir()
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *map(chr, range(33, 127)),
        *(f"##{chr(c)}" for c in range(33, 127)),
    ]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return str(folder)
