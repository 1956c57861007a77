"""Texts that come from elsewhere, made safe to show: a server's, an agent's, a submitter's, a file's."""

from __future__ import annotations

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def replace_unprintable(text: str) -> str:
    """Return the text with "�" for escapes, control and direction characters and line breaks."""
    return "".join(mark if mark.isprintable() else REPLACEMENT for mark in text)


def one_line(text: str) -> str:
    """Return the text as one line that can neither harm a terminal nor feign another line of a log.

    White space becomes single spaces, what cannot be printed "�".
    """
    return replace_unprintable(" ".join(text.split()))
