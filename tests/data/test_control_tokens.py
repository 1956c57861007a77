"""Text in a row's fields stays text; what a template writes is real, and not doubled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fedpeft.config.sections import DataSection
from fedpeft.data.control_tokens import TokenFrame, special_frame
from fedpeft.data.row_records import RowRecord, RowSet, Selection, collect, row_set
from fedpeft.data.section_layout import make_layout
from fedpeft.data.tokenize import tokenize
from fedpeft.errors import DataError

BOS, EOS, UNKNOWN = 1, 2, 3
CONTROL = ["<s>", "</s>", "<|user|>", "<unk>"]


def chat_tokenizer() -> Any:
    """A byte-level BPE with a chat format's tokens, as decoders have."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator(["the user said that the end is near"], trainer)
    core.add_special_tokens([AddedToken("<|user|>", special=True)])
    core.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A", "</s>"], special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def rows_of(fields: Sequence[dict[str, Any]], **templates: str) -> RowSet:
    section = DataSection.model_validate({"train": "x.jsonl", **templates})
    layout = make_layout(section, "causal-lm")
    records = [RowRecord(0, "f", number, row) for number, row in enumerate(fields, start=1)]
    return row_set(collect(records, layout, Selection(), None), layout, None)


def encoded(tokenizer: Any, fields: dict[str, Any], *, real: bool = False, **templates: Any) -> list[int]:
    rows = tokenize(rows_of([fields], **templates), tokenizer, 200, control_tokens=real).rows
    return [int(token) for token in rows.row(0)]


@settings(deadline=None, max_examples=60)
@given(parts=st.lists(st.sampled_from([*CONTROL, "<", "/s>", "|user", "|>", "the end ", "é"]), max_size=6))
def test_cells_hold_no_control_token_and_read_back(parts: list[str]) -> None:
    tokenizer, cell = chat_tokenizer(), "".join(parts)
    ids = encoded(tokenizer, {"q": cell, "a": cell}, prompt="<|user|>{q}</s>", answer="{a}")
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    assert (ids.count(BOS), ids.count(user), ids.count(EOS), ids.count(UNKNOWN)) == (1, 1, 2, 0)
    assert ids[:2] == [BOS, user]
    assert tokenizer.decode(ids) == f"<s><|user|>{cell}</s>{cell}</s>"


def test_a_control_token_that_only_template_and_cell_together_make_is_none() -> None:
    ids = encoded(chat_tokenizer(), {"q": "/s> more"}, text="<{q}")
    assert ids.count(EOS) == 1
    assert ids[-1] == EOS


def test_ordinary_rows_are_the_tokenizers_own_encoding() -> None:
    tokenizer = chat_tokenizer()
    for text in ("the user said <that>", "a < b </ c", "<|use|>"):
        assert encoded(tokenizer, {"q": text}, text="so {q}.") == tokenizer(f"so {text}.")["input_ids"]


def test_a_run_may_make_them_real() -> None:
    tokenizer = chat_tokenizer()
    text = "a<|user|>b</s>c"
    assert encoded(tokenizer, {"q": text}, text="{q}", real=True) == tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    ("templates", "wanted"),
    [
        ({"text": "<s>{q}"}, "<s>x</s>"),
        ({"text": "<s>{q}</s>"}, "<s>x</s>"),
        ({"text": "{q}</s>"}, "<s>x</s>"),
        ({"prompt": "<s>{q}", "answer": "{a}"}, "<s>xy</s>"),
        ({"prompt": "{q}", "answer": "{a}</s>"}, "<s>xy</s>"),
        ({"prompt": "{q}</s>", "answer": "{a}"}, "<s>x</s>y</s>"),  # a turn that the template ends stays
    ],
)
def test_what_a_template_writes_is_not_doubled(templates: dict[str, Any], wanted: str) -> None:
    tokenizer = chat_tokenizer()
    ids = encoded(tokenizer, {"q": "x", "a": "y"}, **templates)
    assert tokenizer.decode(ids) == wanted


def test_the_frame_is_found_for_tokenizers_of_other_signs() -> None:
    class Skipping:
        """A tokenizer that drops what its vocabulary lacks, as BPE without an unknown token does."""

        eos_token_id = 1
        all_special_ids = (0, 1)
        all_special_tokens = ("<s>", "</s>")

        def get_vocab(self) -> dict[str, int]:
            return {"<s>": 0, "</s>": 1, "é": 2, "ü": 3}

        def __call__(self, text: str, **options: Any) -> Any:
            known = [self.get_vocab()[sign] for sign in text if sign in "éü"]
            return {"input_ids": [0, *known, 1] if options.get("add_special_tokens", True) else known}

    assert special_frame(Skipping()) == TokenFrame((0,), (1,))


def test_a_tokenizer_of_control_tokens_alone_is_refused() -> None:
    class Empty:
        eos_token_id = 1
        all_special_ids = (0, 1)

        def get_vocab(self) -> dict[str, int]:
            return {"<s>": 0, "</s>": 1}

        def __call__(self, text: str, **options: Any) -> Any:
            return {"input_ids": []}

    with pytest.raises(DataError, match="encodes no text"):
        special_frame(Empty())


def test_a_tokenizer_that_cannot_spell_a_control_token_is_refused() -> None:
    class Deaf:
        """Turns the text into its control token whatever is asked."""

        eos_token_id = EOS
        all_special_ids = (EOS,)
        all_special_tokens = ("</s>",)

        def __call__(self, text: Any, **options: Any) -> Any:
            one = [EOS if "</s>" in text else 9]
            return {"input_ids": one if isinstance(text, str) else [[EOS] for _ in text]}

    with pytest.raises(DataError, match=r"control token.*data\.control_tokens"):
        encoded(Deaf(), {"q": "</s>"}, text="{q}")


def test_the_frame_is_found_where_every_text_is_unknown() -> None:
    class Unknowing:
        eos_token_id = None
        unk_token_id = 1
        all_special_ids = (0, 1, 2)
        all_special_tokens = ("[CLS]", "[UNK]", "[SEP]")

        def __call__(self, text: str, **options: Any) -> Any:
            return {"input_ids": [0, 1, 2] if options.get("add_special_tokens", True) else [1]}

    assert special_frame(Unknowing()) == TokenFrame((0,), (2,))
