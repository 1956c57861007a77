"""What a run file may hand to `peft`: nothing that it would import, fetch or open."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fedpeft.config.sections import PeftSection
from fedpeft.models.methods import METHODS
from fedpeft.models.option_types import annotations_of, is_open
from fedpeft.models.options import _OURS, config_class, peft_problems

REFUSED: dict[str, dict[str, Any]] = {
    "a module to import": {"method": "lora", "megatron_core": "antigravity", "megatron_config": {"a": 1}},
    "a module's options": {"method": "lora", "megatron_config": {"tensor_model_parallel_size": 1}},
    "a tokenizer with code": {
        "method": "prompt",
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "x",
        "tokenizer_name_or_path": "/tmp/evil",
        "tokenizer_kwargs": {"trust_remote_code": True},
    },
    "a start from text": {"method": "prompt", "prompt_tuning_init": "TEXT"},
    "a folder": {"method": "prompt", "tokenizer_name_or_path": "../x"},
    "a whole configuration": {"method": "lora", "eva_config": {"rho": 2.0}},
    "another one": {"method": "lora", "corda_config": {"cache_file": "/etc/passwd"}},
    "a router's models": {"method": "lora", "arrow_config": {"arrow_expert_num": 3}},
    "text for a number": {"method": "lora", "r": "8"},
    "a truth value for a number": {"method": "lora", "lora_alpha": True},
    "a number for a truth value": {"method": "lora", "use_rslora": 1},
    "no such choice": {"method": "lora", "bias": "some"},
    "no word": {"method": "vera", "bias": "/etc/passwd"},
    "no such start": {"method": "lora", "init_lora_weights": "/tmp/start"},
    "no finite number": {"method": "lora", "lora_dropout": float("inf")},
    "tables in a table": {"method": "lora", "rank_pattern": {"q_proj": {"a": {}}}},
    "tables in a list": {"method": "lora", "target_modules": [{"a": 1}]},
}
TAKEN: dict[str, dict[str, Any]] = {
    "lora": {
        "method": "lora",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "bias": "all",
        "use_rslora": True,
        "target_modules": ["q_proj"],
        "modules_to_save": ["head"],
        "rank_pattern": {"q_proj": 2},
        "layers_to_transform": [0],
        "init_lora_weights": "gaussian",
    },
    "no start": {"method": "lora", "init_lora_weights": False},
    "a start of ours": {"method": "lora", "init_lora_weights": "lq-lora", "loftq_config": {"loftq_iter": 1}},
    "one expression": {"method": "lora", "target_modules": ".*q_proj"},
    "a whole number for a number": {"method": "lora", "lora_dropout": 0},
    "prompt": {"method": "prompt", "num_virtual_tokens": 4, "prompt_tuning_init": "RANDOM"},
    "p-tuning": {"method": "p-tuning", "encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 8},
    "a word": {"method": "peanut", "act_fn": "gelu"},
    "a wavelet": {"method": "waveft", "wavelet_family": "db2"},
    "road": {"method": "road", "variant": "road_2"},
}


@pytest.mark.parametrize("what", sorted(REFUSED))
def test_what_peft_would_act_on_is_refused_by_name(what: str) -> None:
    section = PeftSection.model_construct(**REFUSED[what])
    section.__pydantic_extra__ = {key: value for key, value in REFUSED[what].items() if key != "method"}
    assert peft_problems(section, "causal-lm")


@pytest.mark.parametrize("what", sorted(TAKEN))
def test_numbers_choices_and_names_are_taken(what: str) -> None:
    assert peft_problems(PeftSection.model_validate(TAKEN[what]), "causal-lm") == ()


def test_the_options_that_no_run_file_sets_are_these() -> None:
    """One that a later `peft` adds as text, or as a configuration, is refused until somebody looks at it."""
    closed = {
        field.name
        for method in METHODS.values()
        for config in (config_class(method),)
        for field in dataclasses.fields(config)
        if field.init and field.name not in _OURS
        if not is_open(field.name, annotations_of(config)[field.name])
    }
    assert closed == {
        "megatron_core",
        "megatron_config",
        "prompt_tuning_init_text",
        "tokenizer_name_or_path",
        "tokenizer_kwargs",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "velora_config",
        "monteclora_config",
        "use_bdlora",
        "arrow_config",
        "kasa_config",
    }
