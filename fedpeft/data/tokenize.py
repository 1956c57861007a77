"""Texts to token rows, in batches, within a length limit."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fedpeft.data.encoded import Encoded, Texts, offsets_of
from fedpeft.data.records import RowSet
from fedpeft.errors import DataError

CHUNK = 256  # texts per call of the tokenizer: enough for its threads, little memory
PROMPT_SHARE = 4  # a row's prompt keeps at least max_length // this many tokens however long the answer is


class Tokenizer(Protocol):
    """What we need of a `transformers` tokenizer."""

    @property
    def eos_token_id(self) -> Any:
        """Id of the end token, or None."""

    def __call__(self, text: Any, **options: Any) -> Any:
        """Tokenise one text or a list; the result's "input_ids" has the ids."""


@dataclass(frozen=True)
class Tokenized:
    """Encoded rows and how many of them were cut to the length limit."""

    rows: Encoded
    cut: int


@dataclass(frozen=True)
class Frame:
    """The special tokens that a tokenizer puts before and after a text."""

    before: tuple[int, ...]
    after: tuple[int, ...]


def tokenize(rows: RowSet, tokenizer: Tokenizer, max_length: int) -> Tokenized:
    """Encode rows.

    A row with an answer is the tokenizer's leading special tokens, the prompt, the answer (tokenised apart,
    so that generation from the prompt alone meets the same tokens) and the end token if there is one. A row
    that is too long loses the beginning of its prompt, leading special tokens kept, so that the answer
    survives; only where the answer would leave the prompt less than a quarter of the limit is its end cut
    too, the end token with it. Other rows are the tokenizer's own encoding of the text, without an extra end
    token; too long, they lose their end.

    Raises:
        DataError: the limit leaves no room beside the special tokens.
    """
    frame = special_frame(tokenizer)
    flat = array("i")
    lengths: list[int] = []
    starts: list[int] = []
    cut = 0
    if rows.answers is None:
        pieces = _plain_rows(rows.prompts, tokenizer, frame, max_length)
    else:
        pieces = _answered_rows(rows.prompts, rows.answers, tokenizer, frame, max_length)
    for ids, start, whole in pieces:
        flat.extend(ids)
        lengths.append(len(ids))
        starts.append(start)
        cut += len(ids) < whole
    encoded = Encoded(
        input_ids=np.frombuffer(flat, dtype=np.int32) if flat else np.zeros(0, dtype=np.int32),
        offsets=offsets_of(lengths),
        answer_start=np.array(starts, dtype=np.int32),
        labels=rows.labels,
        answers=rows.answers,
        users=rows.users,
    )
    return Tokenized(encoded, cut)


def special_frame(tokenizer: Tokenizer) -> Frame:
    """Find the special tokens around a text by encoding a letter with and without them."""
    framed = list(tokenizer("a")["input_ids"])
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return Frame(tuple(framed[:start]), tuple(framed[start + len(bare) :]))
    raise DataError(
        f"the tokenizer encodes 'a' as {framed} with special tokens and as {bare} without; "
        "needs one that puts special tokens around a text and leaves it as it is"
    )


Piece = tuple[Sequence[int], int, int]
"""A row's ids, where its answer starts, and its length before cutting."""


def _plain_rows(texts: Texts, tokenizer: Tokenizer, frame: Frame, max_length: int) -> Iterator[Piece]:
    room = max_length - len(frame.before) - len(frame.after)
    _refuse_no_room(room, max_length)
    for ids in _batched(texts, tokenizer):
        yield [*frame.before, *ids[:room], *frame.after], 0, len(ids) + max_length - room


def _answered_rows(
    prompts: Texts, answers: Texts, tokenizer: Tokenizer, frame: Frame, max_length: int
) -> Iterator[Piece]:
    lead = list(frame.before)
    _refuse_no_room(max_length - len(lead) - 1, max_length)
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    floor = max(len(lead) + 1, max_length // PROMPT_SHARE)
    for prompt, bare in zip(_batched(prompts, tokenizer), _batched(answers, tokenizer), strict=True):
        answer = [*bare, *end]
        whole = len(lead) + len(prompt) + len(answer)
        answer = answer[: max_length - min(len(lead) + len(prompt), floor)]
        kept = min(len(prompt), max_length - len(lead) - len(answer))
        start = len(lead) + kept
        yield [*lead, *prompt[len(prompt) - kept :], *answer], start, whole


def _batched(texts: Texts, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """The ids of each text without special tokens."""
    for first in range(0, len(texts), CHUNK):
        chunk = [texts[index] for index in range(first, min(first + CHUNK, len(texts)))]
        yield from tokenizer(
            chunk,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # it would warn of rows beyond the model's length; we cut and count them
        )["input_ids"]


def _refuse_no_room(room: int, max_length: int) -> None:
    if room < 1:
        raise DataError(f"data.max_length is {max_length}, which the special tokens alone fill; raise it")
