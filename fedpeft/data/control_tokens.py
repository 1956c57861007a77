"""Control tokens: where a tokenizer puts its own, and how text in a row's fields stays text.

A template may write control tokens, such as those of a chat format, and they are real. A row may not: what
its fields hold is text to learn from, so that nobody who can write a row can begin another role or end an
answer. Most rows hold nothing that looks like a control token and are encoded as a whole, as the tokenizer
would have it; only the others are encoded in pieces, between the tokens that the template wrote.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from fedpeft.data.encoded import Texts
from fedpeft.errors import DataError

CHUNK = 256  # texts per call of the tokenizer: enough for its threads, little memory
_PROBES = ("a", "A", "0", "the")
_LOOKED_AT = 4096  # entries of a vocabulary that are tried for a text that can be encoded


class Tokenizer(Protocol):
    """What we need of a `transformers` tokenizer."""

    @property
    def eos_token_id(self) -> Any:
        """Id of the end token, or None."""

    def __call__(self, text: Any, **options: Any) -> Any:
        """Tokenise one text or a list; the result's "input_ids" has the ids."""


@dataclass(frozen=True)
class TokenFrame:
    """The special tokens that a tokenizer puts before and after a text."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def inside(self, ids: Sequence[int]) -> list[int]:
        """Return a text's ids without the frame where the text has written it itself."""
        first, last = len(self.before), len(self.after)
        found = list(ids)
        if first and tuple(found[:first]) == self.before:
            found = found[first:]
        if last and tuple(found[-last:]) == self.after:
            found = found[:-last]
        return found


def special_frame(tokenizer: Tokenizer) -> TokenFrame:
    """Find the special tokens around a text by encoding one with and without them.

    Raises:
        DataError: no text can be encoded, or a text is encoded otherwise inside the special tokens.
    """
    special = {int(token) for token in getattr(tokenizer, "all_special_ids", ())}
    special.discard(getattr(tokenizer, "unk_token_id", None))  # it stands where text stands
    for text in _probes(tokenizer):
        bare = _bare(tokenizer, text)
        if not bare or special & set(bare):
            continue  # it says nothing about places
        framed = [int(token) for token in tokenizer(text)["input_ids"]]
        for start in range(len(framed) - len(bare) + 1):
            if framed[start : start + len(bare)] == bare:
                return TokenFrame(tuple(framed[:start]), tuple(framed[start + len(bare) :]))
        raise DataError(
            f"the tokenizer encodes '{text}' as {framed} with special tokens and as {bare} without; "
            "needs one that puts special tokens around a text and leaves it as it is"
        )
    raise DataError(
        "the tokenizer encodes no text of its vocabulary but as special tokens; give the model a tokenizer of"
        " its own"
    )


def _probes(tokenizer: Any) -> Iterator[str]:
    """A few letters, then whatever the vocabulary holds, for tokenizers of other signs than letters."""
    yield from _PROBES
    vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    yield from islice(sorted(vocabulary, key=lambda token: (len(token), token)), _LOOKED_AT)


def _bare(tokenizer: Tokenizer, text: str) -> list[int]:
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


class TextEncoder:
    """Encodes texts without the frame; control tokens become real where a template wrote them alone.

    Args:
        cells_too: whether those become real as well that are written in a row's fields.
    """

    def __init__(self, tokenizer: Tokenizer, *, cells_too: bool = False) -> None:
        self._tokenizer = tokenizer
        named: Any = tokenizer
        named_ids, names = _of(named, "all_special_ids"), _of(named, "all_special_tokens")
        ids = {int(number): str(token) for number, token in zip(named_ids, names, strict=True)}
        added = getattr(named, "added_tokens_decoder", {})
        ids |= {
            int(number): str(token) for number, token in added.items() if getattr(token, "special", False)
        }
        unknown = getattr(named, "unk_token_id", None)  # it also stands for text that the vocabulary lacks
        self._ids = frozenset(ids) - {unknown}
        self._id_of = {token: number for number, token in ids.items()}
        off = cells_too or not ids or bool(getattr(named, "split_special_tokens", False))
        longest_first = sorted(self._id_of, key=lambda token: (-len(token), token))
        self._pattern = None if off else re.compile("|".join(map(re.escape, longest_first)))

    def encode(self, texts: Texts) -> Iterator[list[int]]:
        """Yield the ids of each text.

        Raises:
            DataError: the tokenizer cannot encode a control token as text.
        """
        for first in range(0, len(texts), CHUNK):
            numbers = range(first, min(first + CHUNK, len(texts)))
            chunk = [texts[number] for number in numbers]
            encoded = self._tokenizer(
                chunk,
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,  # it would warn of rows beyond the model's length; we cut and count them
            )["input_ids"]
            for number, text, ids in zip(numbers, chunk, encoded, strict=True):
                yield self._check(text, ids, texts, number)

    def _check(self, text: str, ids: Sequence[int], texts: Texts, number: int) -> list[int]:
        """The ids as they came, if they hold no control token but the template's."""
        if self._pattern is None:
            return list(ids)
        matches = list(self._pattern.finditer(text))
        if not matches and self._ids.isdisjoint(ids):
            return list(ids)
        cells = texts.cells_of(number)
        own = [m for m in matches if all(m.end() <= first or m.start() >= end for first, end in cells)]
        if len(own) == len(matches) and self._count(ids) == self._count_expected(own):
            return list(ids)
        return self._in_pieces(text, own)

    def _in_pieces(self, text: str, own: Sequence[re.Match[str]]) -> list[int]:
        ids: list[int] = []
        place = 0
        for match in own:
            ids += [*self._as_text(text[place : match.start()]), self._id_of[match.group()]]
            place = match.end()
        ids += self._as_text(text[place:])
        if self._count(ids) != self._count_expected(own):
            raise DataError(
                "a row holds a control token of the tokenizer, which this tokenizer cannot encode as text; "
                "leave such rows out, or let them be real with data.control_tokens = true"
            )
        return ids

    def _as_text(self, text: str) -> list[int]:
        if not text:
            return []
        ids = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return [int(token) for token in ids["input_ids"]]

    def _count(self, ids: Sequence[int]) -> int:
        return sum(1 for token in ids if token in self._ids)

    def _count_expected(self, own: Sequence[re.Match[str]]) -> int:
        return sum(1 for match in own if self._id_of[match.group()] in self._ids)


def _of(tokenizer: Any, name: str) -> Sequence[Any]:
    return tuple(getattr(tokenizer, name, ()))
