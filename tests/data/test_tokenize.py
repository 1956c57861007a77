"""Encoding against characters: the tokenizer of these tests has one token for each."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.data.control_tokens import TokenFrame, special_frame
from fedpeft.data.encoded import Texts
from fedpeft.data.row_records import RowSet
from fedpeft.data.tokenize import Tokenized, tokenize
from fedpeft.errors import DataError

BOS, EOS = 1, 2
TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12)
PAIRS = st.lists(st.tuples(TEXT, TEXT), max_size=5)


def chars(text: str) -> list[int]:
    return [ord(char) for char in text]


def encode(tokenizer: Any, pairs: list[tuple[str, str]], max_length: int) -> Tokenized:
    prompts, answers = (
        (Texts.pack(texts) for texts in zip(*pairs, strict=True)) if pairs else (Texts.pack([]),) * 2
    )
    return tokenize(RowSet(prompts, answers, None), tokenizer, max_length)


@settings(deadline=None)
@given(pairs=PAIRS)
def test_prompt_answer_end(tokenizer: Any, pairs: list[tuple[str, str]]) -> None:
    done = encode(tokenizer, pairs, 100)
    for i, (prompt, answer) in enumerate(pairs):
        assert done.rows.prompt(i).tolist() == [BOS, *chars(prompt)]
        assert done.rows.row(i).tolist() == [BOS, *chars(prompt), *chars(answer), EOS]
    assert done.cut == 0
    assert done.rows.answers is not None
    assert list(done.rows.answers) == [answer for _, answer in pairs]


def test_a_tokenizer_without_end_token_or_with_an_end_of_its_own(make_tokenizer: Any) -> None:
    bare = encode(make_tokenizer(before=(), eos=False), [("ab", "c")], 10)
    assert bare.rows.row(0).tolist() == chars("abc")
    framed = encode(make_tokenizer(after=("</s>",)), [("ab", "c")], 10)
    assert framed.rows.row(0).tolist() == [BOS, *chars("abc"), EOS]


@settings(deadline=None)
@given(pairs=PAIRS, max_length=st.integers(3, 16))
def test_long_rows_keep_the_answer_and_the_end_of_the_prompt(
    tokenizer: Any, pairs: list[tuple[str, str]], max_length: int
) -> None:
    done = encode(tokenizer, pairs, max_length)
    cut = 0
    for i, (prompt, answer) in enumerate(pairs):
        whole = [BOS, *chars(prompt), *chars(answer), EOS]
        row, start = done.rows.row(i).tolist(), int(done.rows.answer_start[i])
        assert len(row) == min(len(whole), max_length)
        assert row[0] == BOS
        kept_prompt, kept_answer = row[1:start], row[start:]
        assert kept_prompt == chars(prompt)[len(prompt) - len(kept_prompt) :]
        assert kept_answer == [*chars(answer), EOS][: len(kept_answer)]
        assert len(kept_answer) >= 1
        # The answer loses its end only where the prompt is down to a quarter of the limit already.
        if len(kept_answer) < len(answer) + 1:
            assert start <= max(max_length // 4, 2)
        cut += len(whole) > max_length
    assert done.cut == cut


@settings(deadline=None)
@given(texts=st.lists(TEXT, max_size=5), max_length=st.integers(3, 16))
def test_plain_text_loses_its_end_and_keeps_its_frame(
    make_tokenizer: Any, texts: list[str], max_length: int
) -> None:
    tokenizer = make_tokenizer(after=("</s>",))
    done = tokenize(RowSet(Texts.pack(texts), None, None), tokenizer, max_length)
    for i, text in enumerate(texts):
        # The library's own truncation is the oracle.
        expected = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
        assert done.rows.row(i).tolist() == expected
    assert done.cut == sum(len(text) + 2 > max_length for text in texts)
    assert not done.rows.answer_start.any()


def test_more_rows_than_one_call_of_the_tokenizer(tokenizer: Any) -> None:
    texts = [str(i) for i in range(2100)]
    rows = tokenize(RowSet(Texts.pack(texts), None, None), tokenizer, 16).rows
    assert [rows.row(i).tolist() for i in range(2100)] == [[BOS, *chars(text)] for text in texts]


def test_special_tokens_are_found(make_tokenizer: Any) -> None:
    assert special_frame(make_tokenizer(before=(), after=())) == TokenFrame((), ())
    assert special_frame(make_tokenizer(before=("<s>", "<s>"), after=("</s>",))) == TokenFrame(
        (BOS, BOS), (EOS,)
    )


def test_a_tokenizer_that_changes_a_framed_text_is_refused() -> None:
    class Odd:
        eos_token_id = None

        def __call__(self, text: Any, **options: Any) -> Any:
            return {"input_ids": [5] if options.get("add_special_tokens", True) else [6, 7]}

    with pytest.raises(DataError, match="puts special tokens around a text"):
        special_frame(Odd())


@pytest.mark.parametrize("answers", [None, Texts.pack(["x"])])
def test_a_limit_without_room_is_refused(make_tokenizer: Any, answers: Texts | None) -> None:
    tokenizer = make_tokenizer(before=("<s>", "<s>"))
    with pytest.raises(DataError, match=r"data\.max_length is 2"):
        tokenize(RowSet(Texts.pack(["x"]), answers, None), tokenizer, 2)


def test_long_rows_make_no_noise(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    tokenize(RowSet(Texts.pack(["x" * 50]), None, None), tokenizer, 512)
    assert caplog.text == ""
