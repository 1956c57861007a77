"""Experts that no linear layer holds are named when all linear layers were asked for."""

from __future__ import annotations

from typing import Any

import pytest

from fedpeft.config.sections import PeftSection
from fedpeft.models.attach import attach
from fedpeft.models.coverage import coverage_notes
from tests.models.tiny import tiny_base

EXPERTS = ["experts.down_proj", "experts.gate_up_proj"]
STACKS = 2 * (4 * 32 * 32 + 4 * 64 * 32)  # layers x (experts x out x in)


def notes(kind: str, **options: Any) -> tuple[str, ...]:
    section = PeftSection.model_validate(options)
    return coverage_notes(attach(tiny_base(kind), section, task="causal-lm", seed=0), section)


@pytest.mark.parametrize("options", [{"method": "lora"}, {"method": "dora", "target_modules": "all-linear"}])
def test_frozen_experts_are_named_with_their_share_and_what_trains_them(options: dict[str, Any]) -> None:
    (note,) = notes("mixtral", **options)
    assert f"leaves {STACKS:,} of" in note
    assert 'peft.target_parameters = ["experts.down_proj", "experts.gate_up_proj"]' in note


def test_a_method_without_target_parameters_says_what_else_trains_them() -> None:
    assert "peft.method 'full' trains them" in notes("mixtral", method="vera")[0]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mixtral", {"method": "full"}),
        ("mixtral", {"method": "lora", "target_parameters": EXPERTS}),
        ("mixtral", {"method": "lora", "target_modules": ["q_proj"]}),
        ("llama", {"method": "lora"}),
    ],
)
def test_nothing_is_said_where_nothing_is_left_out_unasked(kind: str, options: dict[str, Any]) -> None:
    assert notes(kind, **options) == ()


def test_those_that_the_run_file_leaves_out_are_still_named() -> None:
    (note,) = notes("mixtral", method="lora", target_parameters=EXPERTS[:1])
    assert "(experts.gate_up_proj)" in note
