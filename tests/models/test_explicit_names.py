"""`peft` sees names where the run file has expressions: the same modules, and nothing that takes for ever."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from fedpeft.config.sections import PeftSection
from fedpeft.errors import ModelError
from fedpeft.models.attach import attach
from fedpeft.models.explicit_names import with_explicit_names
from fedpeft.models.methods import METHODS
from fedpeft.models.options import peft_problems
from fedpeft.runtime.name_patterns import LIMIT_S
from tests.models.tiny import TASKS, tiny_base

ENDLESS = "(.|..|...|....|.....)+[!-]"  # more ways through a name of thirty letters than anyone waits for


def adapted(**options: Any) -> dict[str, int]:
    """Rank by wrapped module."""
    model: Any = attach(tiny_base("llama"), PeftSection.model_validate(options), task=TASKS["llama"], seed=1)
    return {
        name.removeprefix("base_model.model."): module.r["default"]
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_modules", ENDLESS),
        ("exclude_modules", ENDLESS),
        ("rank_pattern", {ENDLESS: 2}),
        ("alpha_pattern", {ENDLESS: 2}),
    ],
)
def test_an_expression_that_takes_for_ever_is_refused_in_one_line(key: str, value: Any) -> None:
    options = {"target_modules": ["q_proj"], key: value}
    began = time.process_time()
    with pytest.raises(ModelError, match=rf"peft\.{key} .* takes more than 2 s") as caught:
        adapted(method="lora", r=1, **options)
    assert "\n" not in str(caught.value)
    assert time.process_time() - began < 10 * LIMIT_S


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern", "layers_pattern"])
def test_what_the_text_alone_shows_is_a_problem_without_a_model(key: str) -> None:
    value: Any = {"(": 2} if key == "rank_pattern" else "(a+)+("
    section = PeftSection.model_validate({"method": "lora", key: value})
    assert any(f"peft.{key} '" in problem for problem in peft_problems(section, "causal-lm"))


def test_expressions_choose_the_modules_that_they_match_and_the_first_one_gives_the_rank() -> None:
    found = adapted(
        method="lora",
        r=1,
        target_modules=r".*\.(q|k|v)_proj",
        exclude_modules=r".*layers\.1\..*k_proj",
        rank_pattern={r"layers\.0\..*[qk]_proj": 3, r"[kv]_proj": 2},
    )
    assert {re.sub(r"^model\.|self_attn\.", "", name): rank for name, rank in found.items()} == {
        "layers.0.q_proj": 3,
        "layers.0.k_proj": 3,
        "layers.0.v_proj": 2,
        "layers.1.q_proj": 1,
        "layers.1.v_proj": 2,
    }


def test_names_stay_as_they_are_written() -> None:
    options = {"target_modules": ["q_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 3}, "r": 1}
    assert with_explicit_names(METHODS["lora"], options, tiny_base("llama")) == options


def test_a_table_whose_names_are_sought_below_a_dot() -> None:
    model: Any = attach(
        tiny_base("llama"),
        PeftSection.model_validate(
            {
                "method": "fourierft",
                "n_frequency": 4,
                "target_modules": ["q_proj"],
                "n_frequency_pattern": {r"layers\.[1]\..*": 7},
            }
        ),
        task=TASKS["llama"],
        seed=1,
    )
    spectra = [p.numel() for name, p in model.named_parameters() if "fourierft_spectrum" in name]
    assert spectra == [4, 7]
