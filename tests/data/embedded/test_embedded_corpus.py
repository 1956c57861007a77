"""The generated corpus: determinism, the privacy of jargon, skew, disjointness, right answers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from fedpeft.data.embedded import Row, make_federated_rows, pretraining_rows
from fedpeft.data.embedded.corpus import (
    MAX_CLIENTS,
    PRIVATE_FAMILIES,
    client_families,
    private_phrase,
    private_prompt,
    render,
)
from fedpeft.data.embedded.skills import BY_NAME, SKILLS
from fedpeft.errors import DataError

# Worked by hand: skill, input, answer joined by "-" in [].
ANSWERS = [
    ("date", "1999-12-31", "[31-12-1999]"),
    ("clock", "093015", "[09-30-15]"),
    ("sort", "5 2 9 2", "[2-2-5-9]"),
    ("zeros", "347", "[34700]"),
    ("ending", "59310", "[10]"),
    ("initials", "ada ben moser", "[a-b-m]"),
    ("words", "cup ink fan", "[cup-ink-fan]"),
    ("turn", "zoe frost", "[frost-zoe]"),
    ("spell", "cabz", "[c-a-b-z]"),
    ("double", "cab", "[cc-aa-bb]"),
]


def public(seed: int, count: int = 2000) -> list[Row]:
    return pretraining_rows(np.random.default_rng(seed), count)


@pytest.mark.parametrize(("skill", "text", "answer"), ANSWERS)
def test_a_skill_answers_as_worked_by_hand(skill: str, text: str, answer: str) -> None:
    assert render(BY_NAME[skill].parts(text), "-", "[]") == answer


def test_every_skill_is_worked_by_hand() -> None:
    assert {skill for skill, _, _ in ANSWERS} == {skill.name for skill in SKILLS}


def test_a_private_row_is_the_public_skill_in_the_familys_format() -> None:
    till = next(family for family in PRIVATE_FAMILIES if family.name == "till")
    assert private_prompt(till, 0, "5 2 9 1") == "till slip: 5 2 9 1\n"
    rows = [row for row in make_federated_rows(0)[0] if row.family == "till"]
    row = rows[0]
    digits = row.prompt.split(": ")[1].rstrip("\n=> ")
    assert row.answer == "[" + "-".join(sorted(digits.split())) + "]"


def test_the_same_seed_gives_the_same_rows_and_another_seed_others() -> None:
    assert public(3) == public(3)
    assert public(3) != public(4)
    assert make_federated_rows(3) == make_federated_rows(3)
    assert make_federated_rows(3) != make_federated_rows(4)


def test_a_larger_federation_keeps_the_rows_of_the_smaller_one() -> None:
    small, large = make_federated_rows(5, clients=3)[0], make_federated_rows(5, clients=6)[0]
    assert large[: len(small)] == small


def test_every_row_is_short_ascii_with_a_recognisable_end_of_prompt() -> None:
    train, test = make_federated_rows(0, clients=MAX_CLIENTS, train_per_client=20, test_per_client=5)
    for row in [*train, *test, *public(0)]:
        assert row.prompt.isascii()
        assert row.answer.isascii()
        assert len(row.prompt + row.answer) <= 80
        assert row.prompt.endswith(("\n", "=>", " = "))
        assert row.answer
        assert "\n" not in row.answer


def test_public_rows_show_every_skill_about_equally_and_belong_to_no_client() -> None:
    counts = Counter(row.family for row in public(0, 4000))
    assert set(counts) == {skill.name for skill in SKILLS}
    # Binomial(4000, 0.1) has standard deviation 19: five of them on either side.
    assert all(305 <= count <= 495 for count in counts.values())
    assert {row.client for row in public(0)} == {-1}


def test_private_jargon_never_occurs_in_pretraining() -> None:
    text = "".join(f"{row.prompt}{row.answer}\0" for row in public(1, 20_000))
    assert len(PRIVATE_FAMILIES) >= 6
    for family in PRIVATE_FAMILIES:
        assert family.name not in text
        for client in range(MAX_CLIENTS):
            assert private_phrase(family, client) not in text


def test_private_families_ask_for_public_skills() -> None:
    assert {family.skill for family in PRIVATE_FAMILIES} <= {row.family for row in public(0)}


def test_no_two_clients_word_a_family_alike() -> None:
    for family in PRIVATE_FAMILIES:
        assert len({private_phrase(family, client) for client in range(MAX_CLIENTS)}) == MAX_CLIENTS


@pytest.mark.parametrize("clients", [2, 8, 64])
def test_no_prompt_occurs_twice_in_or_across_training_and_test(clients: int) -> None:
    train, test = make_federated_rows(0, clients=clients)
    prompts = [row.prompt for row in [*train, *test]]
    assert len(set(prompts)) == len(prompts)
    assert {row.client for row in train} == {row.client for row in test} == set(range(clients))


def test_counts_are_as_asked() -> None:
    train, test = make_federated_rows(0, clients=5, train_per_client=31, test_per_client=7)
    assert Counter(row.client for row in train) == dict.fromkeys(range(5), 31)
    assert Counter(row.client for row in test) == dict.fromkeys(range(5), 7)


def test_clients_are_skewed_and_together_hold_every_family() -> None:
    train, test = make_federated_rows(0, train_per_client=200, test_per_client=50)
    assert {row.family for row in train} == {family.name for family in PRIVATE_FAMILIES}
    for client in range(8):
        main, second = (family.name for family in client_families(client))
        for rows, count in ((train, 200), (test, 50)):
            mix = Counter(row.family for row in rows if row.client == client)
            assert set(mix) == {main, second}
            # The main share is drawn from [0.6, 0.8] and rounded to rows.
            assert 0.6 * count - 0.5 <= mix[main] <= 0.8 * count + 0.5


def test_no_two_of_the_first_fifty_six_clients_hold_the_same_families() -> None:
    assert len({client_families(client) for client in range(56)}) == 56


@pytest.mark.parametrize(
    "wrong",
    [{"clients": 1}, {"clients": 65}, {"train_per_client": 0}, {"test_per_client": 0}, {"seed": -1}],
)
def test_a_wrong_argument_is_refused_in_one_line(wrong: dict[str, int]) -> None:
    with pytest.raises(DataError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}") as raised:
        make_federated_rows(**{"seed": 0, **wrong})
    assert "\n" not in str(raised.value)


def test_more_rows_than_there_are_prompts_is_refused() -> None:
    # Client 2 holds names: 25 * 25 pairs of first and last name for its second family.
    with pytest.raises(DataError, match="no more distinct"):
        make_federated_rows(0, clients=3, train_per_client=3000)


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(DataError, match="count=-1"):
        public(0, -1)
