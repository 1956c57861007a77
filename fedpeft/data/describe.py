"""Values and places in one-line messages."""

from __future__ import annotations

from collections.abc import Iterable

LONGEST = 60
MOST = 8


def show(value: object) -> str:
    """A value's repr, shortened."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def list_names(names: Iterable[object]) -> str:
    """The first few of some names, comma-separated, and how many more there are."""
    all_names = [" ".join(str(name).split()) for name in names]
    more = len(all_names) - MOST
    return ", ".join(all_names[:MOST]) + (f" and {more} more" if more > 0 else "") if all_names else "none"
