"""What the embedded model can do: each skill draws an input and says which parts its answer has.

An answer is its parts joined by a joiner and enclosed by a wrapper, so one skill gives many formats. The
embedded model is pretrained on all of them, and a federation teaches it which format an unseen phrase
stands for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# Words as one text each, because a literal list would take a line per word.
FIRST_NAMES = """
ada ben cleo dan eva finn gus hana ivo jude kim lars mia noor otto pia quin rosa
sven tess uma vic wren yuri zoe
"""
LAST_NAMES = """
arden bloch crane dietz engel frost gomez hayes irwin jonas keane lopez moser
nolan ochoa perez quist reyes stone tovar unger vidal weiss young zeman
"""
THINGS = """
acorn bread chalk delta ember flint grape honey ivory jelly knife lemon maple nylon olive pearl quilt resin
sugar torch umbra vinyl wheat yeast zebra box cup dye egg fan gum hat
ink jar kit log mop nut oil pan rug sap tin
"""


@dataclass(frozen=True)
class Skill:
    """One transformation of a short text.

    Attributes:
        name: Identifier, also the public family's name.
        phrases: The public wordings of the instruction.
        draw: Draws an input text.
        parts: The parts of the answer to an input; one part means that joiners do not show.
    """

    name: str
    phrases: tuple[str, ...]
    draw: Callable[[np.random.Generator], str]
    parts: Callable[[str], tuple[str, ...]]


def _pick(rng: np.random.Generator, lexicon: str) -> str:
    words = lexicon.split()
    return words[int(rng.integers(len(words)))]


def _digits(rng: np.random.Generator, low: int, high: int) -> str:
    """A number of `low` to `high` digits that does not start with zero."""
    length = int(rng.integers(low, high + 1))
    return str(int(rng.integers(10 ** (length - 1), 10**length)))


def _draw_date(rng: np.random.Generator) -> str:
    year, month, day = rng.integers((1950, 1, 1), (2050, 13, 29))
    return f"{year}-{month:02d}-{day:02d}"


def _draw_clock(rng: np.random.Generator) -> str:
    hour, minute, second = rng.integers((0, 0, 0), (24, 60, 60))
    return f"{hour:02d}{minute:02d}{second:02d}"


def _draw_list(rng: np.random.Generator) -> str:
    return " ".join(_pick(rng, THINGS) for _ in range(3))


def _draw_full_name(rng: np.random.Generator) -> str:
    return f"{_pick(rng, FIRST_NAMES)} {_pick(rng, FIRST_NAMES)} {_pick(rng, LAST_NAMES)}"


def _draw_letters(rng: np.random.Generator) -> str:
    return "".join(chr(97 + int(code)) for code in rng.integers(0, 26, size=int(rng.integers(3, 6))))


SKILLS: tuple[Skill, ...] = (
    Skill("date", ("day first", "date backwards"), _draw_date, lambda text: tuple(reversed(text.split("-")))),
    Skill(
        "clock",
        ("as a time", "hours and minutes"),
        _draw_clock,
        lambda text: (text[:2], text[2:4], text[4:]),
    ),
    Skill(
        "sort",
        ("smallest first", "sort up"),
        lambda rng: " ".join(str(digit) for digit in rng.integers(0, 10, size=4)),
        lambda text: tuple(sorted(text.split())),
    ),
    Skill(
        "zeros",
        ("add two zeros", "times hundred"),
        lambda rng: _digits(rng, 3, 5),
        lambda text: (text + "00",),
    ),
    Skill(
        "ending",
        ("last two digits", "keep the end"),
        lambda rng: _digits(rng, 4, 6),
        lambda text: (text[-2:],),
    ),
    Skill(
        "initials",
        ("initials", "first letters"),
        _draw_full_name,
        lambda text: tuple(word[0] for word in text.split()),
    ),
    Skill("words", ("list the words", "copy all"), _draw_list, lambda text: tuple(text.split())),
    Skill(
        "turn",
        ("swap names", "family name first"),
        lambda rng: f"{_pick(rng, FIRST_NAMES)} {_pick(rng, LAST_NAMES)}",
        lambda text: tuple(reversed(text.split())),
    ),
    Skill("spell", ("spell", "letter by letter"), _draw_letters, lambda text: tuple(text)),
    Skill("double", ("double letters", "twice each"), _draw_letters, lambda text: tuple(c + c for c in text)),
)
"""Every public skill."""

BY_NAME: dict[str, Skill] = {skill.name: skill for skill in SKILLS}
