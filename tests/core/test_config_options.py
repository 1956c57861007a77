"""Options of what a table names."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from fedpeft.config.option_tables import build_option, unknown_name
from fedpeft.config.sections import SamplingSection, Section
from fedpeft.errors import RunFileError


class Knob(Section):
    """A thing with two options."""

    size: int
    speed: float = 1.0


TABLE: dict[str, Any] = {"knob": Knob, "lever": Knob}


def refused(name: str, options: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(RunFileError) as caught:
        build_option("stages.2", TABLE, name, options)
    return caught.value.problems


def test_a_name_with_options_is_built() -> None:
    assert build_option("stages.0", TABLE, "knob", {"size": 3}) == Knob(size=3)


def test_unknown_names_come_with_a_guess_and_the_list() -> None:
    (line,) = refused("knbo", {})
    assert "'knbo'" in line
    assert "did you mean 'knob'" in line
    assert line.endswith("knob, lever")
    assert "mean" not in unknown_name("stages.2", "entirely", TABLE)


def test_every_wrong_option_is_named() -> None:
    lines = refused("knob", {"speed": "fast", "colour": 1})
    assert len(lines) == 3
    for expected in ("stages.2.size (knob): is needed", "stages.2.colour (knob): unknown", "stages.2.speed"):
        assert any(line.startswith(expected) for line in lines)
    assert any("'fast'" in line for line in lines)


def test_sections_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Knob(size=1).size = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("keys", "needle"),
    [
        ({"kind": "poisson"}, "needs rate"),
        ({"kind": "all", "cohort": 3}, "needs no further key; cohort was given"),
        ({"kind": "fraction", "fraction": 0.5, "rate": 0.5}, "rate was given"),
        ({"kind": "fraction", "fraction": 0.0}, "greater than 0"),
    ],
)
def test_sampling_takes_exactly_its_own_key(keys: dict[str, Any], needle: str) -> None:
    with pytest.raises(ValidationError, match=needle):
        SamplingSection.model_validate(keys)
