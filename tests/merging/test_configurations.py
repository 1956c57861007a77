"""Which differences between two adapters' configurations keep them from being merged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedpeft.adapters import (
    Average,
    FactorsOnly,
    TaskArithmetic,
    adapter_stack,
    first_difference,
    whole_tensors,
)

ONE: dict[str, Any] = {
    "base_model_name_or_path": "model",
    "bias": "none",
    "init_lora_weights": True,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "modules_to_save": ["score", "classifier"],
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "r": 8,
    "rank_pattern": {},
    "target_modules": ["q_proj", "v_proj"],
    "use_dora": False,
}


@pytest.mark.parametrize(
    "change",
    [
        {"base_model_name_or_path": "/elsewhere/model", "peft_version": "0.11.0", "inference_mode": False},
        {"target_modules": ["v_proj", "q_proj"]},
        {"target_modules": ".*(q|v)_proj"},
        {"lora_dropout": 0.1},
        {"init_lora_weights": "gaussian"},
        {"modules_to_save": ["classifier", "score"]},
        {"use_bdlora": None, "lora_bias": False, "alpha_pattern": {}, "layer_replication": None},
    ],
)
def test_what_changes_nothing_is_no_difference(change: dict[str, Any]) -> None:
    assert first_difference(ONE, ONE | change) is None
    assert first_difference(ONE | change, ONE) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "IA3"),
        ("r", 4),
        ("lora_alpha", 8),
        ("use_dora", True),
        ("use_rslora", True),
        ("bias", "all"),
        ("rank_pattern", {"q_proj": 2}),
        ("init_lora_weights", "pissa"),
        ("modules_to_save", ["score"]),
        ("fedpeft_loftq_iter", 3),
    ],
)
def test_what_changes_the_meaning_of_tensors_is_one(key: str, value: Any) -> None:
    assert first_difference(ONE, ONE | {key: value}) == (key, ONE.get(key), value)


def test_keys_that_are_missing_are_off() -> None:
    shorter = {key: value for key, value in ONE.items() if value}
    assert first_difference(ONE, shorter) is None


def test_whole_tensors_beside_factors_are_averaged() -> None:
    a, b, embedding = "m.q_proj.lora_A.weight", "m.q_proj.lora_B.weight", "m.embed_tokens.weight"
    one = {name: np.full(4, value, dtype=np.float32) for name, value in ((a, 1), (b, 2), (embedding, 5))}
    other = {name: np.full(4, value, dtype=np.float32) for name, value in ((a, 3), (b, 4), (embedding, 7))}
    stack = adapter_stack([one, other], [1, 3])
    assert whole_tensors(stack) == (embedding,)

    rule = TaskArithmetic(lam=0.5)
    merged = FactorsOnly(rule).merge(stack)
    assert merged.keys() == one.keys()
    assert merged[embedding].tolist() == [(5 + 3 * 7) / 4] * 4
    assert merged[a].tolist() == rule.merge(stack)[a].tolist() == [0.5 * (1 + 3 * 3)] * 4
    assert Average().merge(stack)[embedding].tolist() == merged[embedding].tolist()
    assert str(FactorsOnly(rule)) == str(rule)
