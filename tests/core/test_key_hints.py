"""Keys that users of other trainers type."""

from __future__ import annotations

import pytest

from fedpeft.config.key_hints import ELSEWHERE, OPEN, list_known_keys, suggest_key, suggest_option
from fedpeft.config.run_file import build_run
from fedpeft.errors import RunFileError


def test_every_key_that_is_suggested_is_one() -> None:
    keys = list_known_keys()
    assert {"training.lr", "data.partitioner.clients", "privacy.clip_norm", "run.seed"} <= set(keys)
    assert [key for key in ELSEWHERE.values() if key not in keys and not key.startswith(OPEN)] == []
    assert [name for name in ELSEWHERE if name in {key.rpartition(".")[2] for key in keys}] == []


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("training.learning_rate", "training.lr"),
        ("num_train_epochs", "training.epochs"),
        ("training.per_device_train_batch_size", "training.batch_size"),
        ("training.lr_scheduler_type", "training.schedule"),
        ("lora_r", "peft.r"),
        ("federation.rounds", "run.rounds"),
        ("trainign", "training"),
        ("training.batchsize", "training.batch_size"),
        ("privacy.clipnorm", "privacy.clip_norm"),
    ],
)
def test_a_key_of_another_trainer_or_with_a_slip_is_recognised(typed: str, meant: str) -> None:
    assert suggest_key(typed) == f"; did you mean {meant}?"


def test_options_of_a_method_are_recognised_too() -> None:
    known = ["r", "lora_alpha", "lora_dropout", "target_modules"]
    assert suggest_option("lora_r", "peft", known) == "r"
    assert suggest_option("alpha", "peft", known) == "lora_alpha"
    assert suggest_option("learning_rate", "peft", known) == ""


def test_a_run_file_says_so() -> None:
    tables = {"run": {"name": "x", "rounds": 1}, "training": {"learning_rate": 1.0, "zzz": 1}}
    with pytest.raises(RunFileError) as caught:
        build_run(tables, source="run.toml")
    assert caught.value.problems == (
        "training.learning_rate: unknown key; did you mean training.lr?",
        "training.zzz: unknown key; remove it or check its spelling",
    )
