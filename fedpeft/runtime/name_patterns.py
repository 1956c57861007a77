"""Regular expressions of a run file over the names of a model's modules, matched in bounded time.

A run file comes from somebody else as a rule, and there are short expressions that Python's `re` matches
against a short name for longer than anyone waits. Here an expression is written as for `re`, and matched by
the `regex` library, which gives up when its time is over.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable

import regex

from fedpeft.errors import ModelError

LIMIT_S = 2.0  # of one expression, over all names; an ordinary one takes milliseconds for thousands of names
LONGEST = 1000  # characters
_PLAIN = re.compile(r"[\w.-]+")
_ANY_BRACE, _COUNT = re.compile(r"\{"), re.compile(r"\{\d*,?\d*\}")


def is_plain(text: str) -> bool:
    """Whether a text is a name, and nothing of an expression but dots."""
    return _PLAIN.fullmatch(text) is not None


class NamePattern:
    """One expression; it may be matched for `LIMIT_S` altogether.

    Args:
        text: as `re` takes it.
        key: of the run file, for errors.

    Raises:
        ModelError: it is none, or too long.
    """

    def __init__(self, text: str, key: str) -> None:
        self._key, self._left_s = key, LIMIT_S
        if len(text) > LONGEST:
            raise ModelError(f"{key} has {len(text)} characters, {LONGEST} are taken; give a list of names")
        shown = f"{key} '{text}'"
        if len(_ANY_BRACE.findall(text)) != len(
            _COUNT.findall(text)
        ):  # `regex` has uses for them, names none
            raise ModelError(f"{shown} has a brace that holds no count; give a list of names")
        try:
            re.compile(text)
            self._compiled = regex.compile(text, regex.VERSION0)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise ModelError(f"{shown} is no regular expression: {error}") from error
        self._shown = shown

    def fits(self, name: str) -> bool:
        """Whether it matches a whole name.

        Raises:
            ModelError: its time is over.
        """
        began = time.monotonic()
        try:
            if self._left_s <= 0:
                raise TimeoutError
            return self._compiled.fullmatch(name, timeout=self._left_s) is not None
        except TimeoutError:
            raise ModelError(
                f"{self._shown} takes more than {LIMIT_S:g} s to match; write a simpler one, or names"
            ) from None
        finally:
            self._left_s -= time.monotonic() - began

    def ends(self, name: str) -> bool:
        """Whether it matches a whole name, or all of its end after some dot; raises as `fits`."""
        return self.fits(name) or any(
            self.fits(name[at + 1 :]) for at, sign in enumerate(name) if sign == "."
        )

    def matching(self, names: Iterable[str]) -> list[str]:
        """The names that it matches wholly; raises as `fits`."""
        return [name for name in names if self.fits(name)]
