"""Expressions over names: what `re` says of them, and in bounded time."""

from __future__ import annotations

import re
import time

import pytest

from fedpeft.errors import ModelError
from fedpeft.runtime.name_patterns import LIMIT_S, LONGEST, NamePattern

NAMES = ("q_proj", "model.layers.0.self_attn.q_proj", "model.layers.10.mlp.up_proj", "lm_head")
ENDLESS = ("(a|aa)+$", "(.|..|...|....)+[?-]")  # more ways to match than there are atoms
LONG_NAME = "a" * 400 + "!"


@pytest.mark.parametrize(
    "text",
    [
        "q_proj",
        r".*\.(q|up)_proj",
        r"model\.layers\.\d\..*",
        "(?i)LM_HEAD",
        ".*",
        r"model\.layers\.\d{2}\..*",
        "x",
    ],
)
def test_what_matches_is_what_the_standard_library_matches(text: str) -> None:
    pattern = NamePattern(text, "key")
    assert pattern.matching(NAMES) == [name for name in NAMES if re.fullmatch(text, name)]
    inner = text.removeprefix("(?i)")
    flags = re.IGNORECASE if inner != text else 0
    for name in NAMES:
        assert pattern.ends(name) == bool(re.match(rf"(.*\.)?({inner})$", name, flags))


@pytest.mark.parametrize("text", ENDLESS)
def test_an_expression_without_end_is_refused_in_time(text: str) -> None:
    """All names share its time, so that many names don't multiply it."""
    pattern, began = NamePattern(text, "peft.target_modules"), time.process_time()
    with pytest.raises(ModelError, match=f"takes more than {LIMIT_S:g} s to match"):
        pattern.matching([LONG_NAME] * 1000)
    assert time.process_time() - began < 3 * LIMIT_S


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("(", "is no regular expression"),
        ("a" * (LONGEST + 1), f"{LONGEST} are taken"),
        ("(?:a){e<=3}", "a brace that holds no count"),
        (r"\L<names>", "is no regular expression"),
        ("(?R)", "is no regular expression"),
    ],
)
def test_what_is_no_expression_is_refused(text: str, says: str) -> None:
    with pytest.raises(ModelError, match=re.escape(says)):
        NamePattern(text, "key")
