"""A tokenizer that a person can check by hand, and files of rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNKNOWN = 0, 1, 2, 3
MakeTokenizer = Callable[..., Any]
WriteRows = Callable[[str, Sequence[Any]], Path]


def _build(before: Sequence[str], after: Sequence[str], eos: bool) -> Any:
    names = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": UNKNOWN}
    vocabulary = {**names, **{chr(code): code for code in range(32, 127)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after], special_tokens=[(name, names[name]) for name in ("<s>", "</s>")]
    )
    ends = {"eos_token": "</s>"} if eos else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        unk_token="<unk>",
        model_max_length=16,
        **ends,
    )


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    """Build a one-token-per-character tokenizer with special tokens before and after a text."""

    def make(before: Sequence[str] = ("<s>",), after: Sequence[str] = (), eos: bool = True) -> Any:
        return _build(before, after, eos)

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: MakeTokenizer) -> Any:
    """One token per character, `<s>` before."""
    return make_tokenizer()


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """Write a JSON lines file and return its path."""

    def write(name: str, rows: Sequence[Any]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
