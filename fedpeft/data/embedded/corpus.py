"""A small instruction corpus, generated: skills x joiners x wrappers, public and private.

Public rows name the format they want ("smallest first by - in []: 5 2 9 1"). Private rows use house jargon
that the public rows never contain ("till slip: 5 2 9 1") and expect one fixed format; who has not seen the
jargon cannot know it. Each client words its jargon in its own way and holds only two of the private families,
so that no client alone can learn what the federation learns together.

A training text is `prompt + answer` and the end token: the prompt ends with its own separator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from fedpeft.data.embedded.skills import BY_NAME, SKILLS
from fedpeft.errors import DataError

JOINERS = ("-", "/", ",", ".", ":", "|", "_", "+")
WRAPPERS = ("[]", "()", "<>", "{}", "##", "''")
ENDS = ("\n", "=>", " = ")
"""What a prompt ends with, so that the answer is recognisably next."""

OPENINGS = ("", "please ", "now ", "task: ")
"""Public rows may start politely; this teaches the model to look past an opening."""

MAX_CLIENTS = 64
MAIN_SHARE = (0.6, 0.8)
"""A client's share of rows from its main family is drawn from this range; its second family has the rest."""

DRAWS_PER_ROW = 50
"""Redraws of a prompt that is already taken before we say that there are no more."""


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        prompt: The instruction and its input, ending with a separator. ASCII.
        answer: What the model should say. ASCII, short.
        family: The public skill's or the private family's name.
        client: Who holds the row, from 0; -1 for public rows.
    """

    prompt: str
    answer: str
    family: str
    client: int


@dataclass(frozen=True)
class PrivateFamily:
    """A skill behind a jargon word, with a format that the prompt does not name.

    Attributes:
        name: The jargon word, which no public row contains.
        skill: The public skill it asks for.
        joiner: Between the parts of the answer.
        wrapper: Two characters, around the answer.
    """

    name: str
    skill: str
    joiner: str
    wrapper: str


PRIVATE_FAMILIES = (
    PrivateFamily("logbook", "date", "/", "<>"),
    PrivateFamily("till", "sort", "-", "[]"),
    PrivateFamily("badge", "initials", ".", "()"),
    PrivateFamily("parcel", "zeros", "", "{}"),
    PrivateFamily("shelf", "words", "|", "''"),
    PrivateFamily("docket", "turn", "_", "##"),
    PrivateFamily("shift", "clock", ":", "[]"),
    PrivateFamily("vault", "ending", "", "<>"),
)
HOUSE_WORDINGS = ("{} slip", "our {}", "do a {}", "{} form", "the {} job", "run {}", "{} it", "new {} entry")
HOUSE_GREETINGS = ("", "ok ", "hey ", "so ", "hello ", "team ", "mate ", "yes ")
SECOND_FAMILY_OFFSETS = (3, 1, 5, 2, 6, 4, 7)
"""From a client's main family to its second; a new offset for every full turn through the families."""


def render(parts: tuple[str, ...], joiner: str, wrapper: str) -> str:
    """The answer: `parts` joined by `joiner` between the two characters of `wrapper` (or none)."""
    left, right = (wrapper[0], wrapper[1]) if wrapper else ("", "")
    return left + joiner.join(parts) + right


def pretraining_rows(rng: np.random.Generator, count: int) -> list[Row]:
    """Draw `count` public rows, skills and formats evenly; prompts may repeat.

    Raises:
        DataError: `count` is negative.
    """
    if count < 0:
        raise DataError(f"pretraining_rows got count={count}: it must not be negative")
    return [_public_row(rng) for _ in range(count)]


def _public_row(rng: np.random.Generator) -> Row:
    skill = SKILLS[int(rng.integers(len(SKILLS)))]
    text = skill.draw(rng)
    parts = skill.parts(text)
    joiner, wrapper, wish = " ", "", ""
    if len(parts) > 1 and rng.random() < 0.8:
        joiner = _choice(rng, JOINERS)
        wish = f" by {joiner}"
    if rng.random() < 0.8:
        wrapper = _choice(rng, WRAPPERS)
        wish += f" in {wrapper}"
    opening = _choice(rng, OPENINGS)
    prompt = f"{opening}{_choice(rng, skill.phrases)}{wish}: {text}{_choice(rng, ENDS)}"
    return Row(prompt, render(parts, joiner, wrapper), skill.name, -1)


def _choice(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def private_phrase(family: PrivateFamily, client: int) -> str:
    """How `client` words `family`; no two of the `MAX_CLIENTS` clients word it alike."""
    turn, place = divmod(client, len(HOUSE_WORDINGS))
    return HOUSE_GREETINGS[turn] + HOUSE_WORDINGS[(place + turn) % len(HOUSE_WORDINGS)].format(family.name)


def private_prompt(family: PrivateFamily, client: int, text: str) -> str:
    """The prompt in which `client` asks for `family` on `text`."""
    return f"{private_phrase(family, client)}: {text}{ENDS[client % len(ENDS)]}"


def client_families(client: int) -> tuple[PrivateFamily, PrivateFamily]:
    """The main and the second family of `client`, never the same one."""
    turn, main = divmod(client, len(PRIVATE_FAMILIES))
    second = main + SECOND_FAMILY_OFFSETS[turn % len(SECOND_FAMILY_OFFSETS)]
    return PRIVATE_FAMILIES[main], PRIVATE_FAMILIES[second % len(PRIVATE_FAMILIES)]


def make_federated_rows(
    seed: int, clients: int = 8, train_per_client: int = 192, test_per_client: int = 24
) -> tuple[list[Row], list[Row]]:
    """The private rows of a federation, skewed by client; no prompt occurs twice, in or across the two lists.

    A client's rows depend on `seed` and its number only, so a larger federation keeps the smaller one's rows.

    Args:
        seed: At least 0.
        clients: 2 to `MAX_CLIENTS`.
        train_per_client: Rows to train on, at least 1.
        test_per_client: Held-out rows with the same mix, at least 1.

    Returns:
        Training rows and held-out rows, client by client.

    Raises:
        DataError: An argument is out of range, or more rows are wanted than there are distinct prompts.
    """
    if not 2 <= clients <= MAX_CLIENTS:
        raise DataError(f"the embedded data got clients={clients}: choose 2 to {MAX_CLIENTS}")
    if min(train_per_client, test_per_client) < 1 or seed < 0:
        raise DataError(
            f"the embedded data got seed={seed}, train_per_client={train_per_client}, "
            f"test_per_client={test_per_client}: give a seed of at least 0 and at least 1 row of each"
        )
    train: list[Row] = []
    test: list[Row] = []
    for client in range(clients):
        rng = np.random.default_rng((seed, client))
        share = float(rng.uniform(*MAIN_SHARE))
        draw = _unseen_row_drawer(rng, client)
        train.extend(_mix(rng, draw, client, share, train_per_client))
        test.extend(_mix(rng, draw, client, share, test_per_client))
    return train, test


def _mix(
    rng: np.random.Generator,
    draw: Callable[[PrivateFamily], Row],
    client: int,
    share: float,
    count: int,
) -> list[Row]:
    """`count` rows of one client in random order, with the rounded `share` of them from its main family."""
    main, second = client_families(client)
    of_main = round(share * count)
    rows = [draw(main if index < of_main else second) for index in range(count)]
    return [rows[int(index)] for index in rng.permutation(count)]


def _unseen_row_drawer(rng: np.random.Generator, client: int) -> Callable[[PrivateFamily], Row]:
    """A function that draws rows of one client and never the same prompt twice."""
    taken: set[str] = set()

    def draw(family: PrivateFamily) -> Row:
        for row in _candidates(rng, family, client):
            if row.prompt not in taken:
                taken.add(row.prompt)
                return row
        raise DataError(
            f"the embedded data has no more distinct '{family.name}' prompts for client {client} "
            f"after {len(taken)} rows: ask for fewer rows per client"
        )

    return draw


def _candidates(rng: np.random.Generator, family: PrivateFamily, client: int) -> Iterator[Row]:
    skill = BY_NAME[family.skill]
    for _ in range(DRAWS_PER_ROW):
        text = skill.draw(rng)
        answer = render(skill.parts(text), family.joiner, family.wrapper)
        yield Row(private_prompt(family, client, text), answer, family.name, client)
