"""Texts to token rows, in batches, within a length limit."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedpeft.data.control_tokens import TextEncoder, TokenFrame, Tokenizer, special_frame
from fedpeft.data.encoded import Encoded, Texts, offsets_of
from fedpeft.data.row_records import RowSet
from fedpeft.errors import DataError

PROMPT_SHARE = 4  # a row's prompt keeps at least max_length // this many tokens however long the answer is


@dataclass(frozen=True)
class Tokenized:
    """Encoded rows and how many of them were cut to the length limit."""

    rows: Encoded
    cut: int


def tokenize(
    rows: RowSet, tokenizer: Tokenizer, max_length: int, *, control_tokens: bool = False
) -> Tokenized:
    """Encode rows.

    A row with an answer is the tokenizer's leading special tokens, the prompt, the answer (tokenised apart,
    so that generation from the prompt alone meets the same tokens) and the end token if there is one. A row
    that is too long loses the beginning of its prompt, leading special tokens kept, so that the answer
    survives; only where the answer would leave the prompt less than a quarter of the limit is its end cut
    too, the end token with it. Other rows are the tokenizer's own encoding of the text, without an extra end
    token; too long, they lose their end.

    Special tokens that a template writes itself, at the beginning or the end, are not doubled.

    Args:
        control_tokens: whether control tokens written in a row's fields become real ones.

    Raises:
        DataError: the limit leaves no room beside the special tokens.
    """
    frame, encoder = special_frame(tokenizer), TextEncoder(tokenizer, cells_too=control_tokens)
    flat = array("i")
    lengths: list[int] = []
    starts: list[int] = []
    cut = 0
    if rows.answers is None:
        pieces = _plain_rows(rows.prompts, encoder, frame, max_length)
    else:
        end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        pieces = _encode_answered_rows(rows.prompts, rows.answers, encoder, frame.before, end, max_length)
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


Piece = tuple[Sequence[int], int, int]
"""A row's ids, where its answer starts, and its length before cutting."""


def _plain_rows(texts: Texts, encoder: TextEncoder, frame: TokenFrame, max_length: int) -> Iterator[Piece]:
    room = max_length - len(frame.before) - len(frame.after)
    _refuse_no_room(room, max_length)
    for written in encoder.encode(texts):
        ids = frame.inside(written)
        yield [*frame.before, *ids[:room], *frame.after], 0, len(ids) + max_length - room


def _encode_answered_rows(
    prompts: Texts,
    answers: Texts,
    encoder: TextEncoder,
    before: tuple[int, ...],
    end: list[int],
    max_length: int,
) -> Iterator[Piece]:
    lead, opening, closing = list(before), TokenFrame(before, ()), TokenFrame((), tuple(end))
    _refuse_no_room(max_length - len(lead) - 1, max_length)
    floor = max(len(lead) + 1, max_length // PROMPT_SHARE)
    for asked, bare in zip(encoder.encode(prompts), encoder.encode(answers), strict=True):
        prompt, answer = opening.inside(asked), [*closing.inside(bare), *end]
        whole = len(lead) + len(prompt) + len(answer)
        answer = answer[: max_length - min(len(lead) + len(prompt), floor)]
        kept = min(len(prompt), max_length - len(lead) - len(answer))
        start = len(lead) + kept
        yield [*lead, *prompt[len(prompt) - kept :], *answer], start, whole


def _refuse_no_room(room: int, max_length: int) -> None:
    if room < 1:
        raise DataError(f"data.max_length is {max_length}, which the special tokens alone fill; raise it")
