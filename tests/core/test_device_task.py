"""What a device is told of a run, and what it isn't."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from pydantic import BaseModel

from fedpeft.config.device_task import (
    DeviceData,
    DeviceFederation,
    DeviceModel,
    DeviceTask,
    device_task,
    read_device_task,
)
from fedpeft.config.run_file import build_run, run_digest
from fedpeft.config.run_identity import identity_digest
from fedpeft.config.sections import DataSection, FederationSection, ModelSection, RunConfig
from fedpeft.errors import RunFileError

TABLES: dict[str, Any] = {
    "run": {"name": "t", "rounds": 3, "seed": 7},
    "model": {"path": "/srv/models/secret", "quantization": "rtn4", "keep_modules": ["lm_head"]},
    "peft": {"method": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"]},
    "data": {
        "train": ["/srv/rows/*.jsonl", "datasets:owner/name"],
        "test": "/srv/rows/test.jsonl",
        "prompt": "{question}\n",
        "answer": "{answer}",
        "filter": {"split": "train/1"},
        "test_filter": {"split": "test"},
        "partitioner": {"kind": "natural", "by": "who", "clients": 5},
    },
    "stages": [{"kind": "top-k", "density": 0.5}],
    "federation": {"sampling": {"kind": "fixed", "cohort": 2}, "strategy": {"kind": "fedadam", "eta": 0.1}},
    "privacy": None,
    "evaluation": {"plug_into": "/srv/models/full", "baselines": True, "max_examples": 8},
    "output": {"keep_checkpoints": 3},
    "groups": [{"clients": ["site-1"], "training": {"lr": 0.1}, "model": {"quantization": "rtn8"}}],
}


def run_of(**parts: Any) -> RunConfig:
    return build_run({**TABLES, **parts}, source="test")


def test_no_file_or_source_of_the_server_is_told() -> None:
    text = device_task(run_of()).text
    assert not [word for word in ("srv", "secret", "rows", "owner", "baselines", "who") if word in text]
    assert json.loads(text)["data"]["clients"] == 5


def test_what_a_device_computes_with_is_what_was_let_in() -> None:
    task = device_task(run_of())
    came = read_device_task(task.text)
    assert came == task
    assert came.digest == task.digest == identity_digest(task.text)
    run = came.as_run
    assert run_digest(run) == task.digest, "one digest"
    assert (run.data.train, run.data.test, run.evaluation.plug_into) == ((), None, None)
    assert run.model.path == "own:"
    assert run.data.prompt == "{question}\n"
    assert run.of_client("site-1").model.quantization == "rtn8"
    assert run.of_client("site-1").training.lr == 0.1
    assert run.stages[0].options == {"density": 0.5}
    assert run.federation.strategy.options == {"eta": 0.1}
    assert device_task(run).model == task.model, "and says so again"


OTHERS: tuple[dict[str, Any], ...] = (
    {},
    {"run": {"name": "t", "rounds": 4, "seed": 7}},
    {"training": {"lr": 0.5}},
    {"groups": []},
    {
        "privacy": {
            "kind": "local",
            "clip_norm": 1,
            "noise_multiplier": 1,
            "target_delta": 1e-6,
            "max_epsilon": 9,
        }
    },
)


def test_runs_that_differ_in_what_a_device_is_told_have_other_digests() -> None:
    assert len({device_task(run_of(**parts)).digest for parts in OTHERS}) == len(OTHERS)
    elsewhere = TABLES["data"] | {"test": "/elsewhere.jsonl"}
    assert device_task(run_of(data=elsewhere)).digest == device_task(run_of()).digest


@pytest.mark.parametrize(
    ("path", "name", "told"),
    [
        ("embedded", "embedded", "embedded"),
        ("owner/model", "owner/model", "hub:owner/model"),
        ("hub:owner/model", "owner/model", "hub:owner/model"),
        ("gpt2", "gpt2", "hub:gpt2"),
        ("/srv/model", "", "own:"),
        ("./model", "", "own:"),
        ("../models/a", "", "own:"),
        ("a/b/c", "", "own:"),
        ("package:name/folder", "", "own:"),
    ],
)
def test_a_base_model_is_told_by_its_name_on_the_hub_or_not_at_all(path: str, name: str, told: str) -> None:
    task = device_task(run_of(model={"path": path}))
    assert task.model.name == name
    assert task.as_run.model.path == told


HOSTILE: dict[str, dict[str, Any]] = {
    "an expression": {"peft": {"method": "lora", "target_modules": r".*(q|v)_proj"}},
    "an expression as a key": {"peft": {"method": "lora", "rank_pattern": {"(a+)+$": 4}}},
    "an expression in a list": {"model": {"quantization": "rtn4", "keep_modules": ["(a|a)*b"]}},
    "a path": {"peft": {"method": "prompt", "tokenizer_name_or_path": "/home/owner"}},
    "a path above": {"peft": {"method": "prompt", "tokenizer_name_or_path": ".."}},
    "a path in a stage": {"stages": [{"kind": "top-k", "file": "a/b"}]},
    "a path in the space": {"space": {"kind": "seed-scalars", "cache": "~/x"}},
    "a path in the strategy": {"federation": {"strategy": {"kind": "fedavg", "state": "/tmp/x"}}},
    "a path in a group": {"groups": [{"clients": ["a"], "model": {"path": "/srv/other"}}]},
    "deep tables": {"peft": {"method": "lora", "x": {"a": {"a": {"a": {"a": {"a": {"a": {"a": {}}}}}}}}}},
    "no number": {"peft": {"method": "lora", "lora_dropout": float("nan")}},
}


@pytest.mark.parametrize("what", sorted(HOSTILE))
def test_a_server_does_not_tell_it_and_a_device_does_not_take_it(what: str) -> None:
    run = run_of(**HOSTILE[what])
    with pytest.raises(RunFileError):
        device_task(run)
    tables = json.loads(device_task(run_of()).text) | HOSTILE[what]
    with pytest.raises(RunFileError):
        read_device_task(json.dumps(tables))


@pytest.mark.parametrize(
    ("tables", "what"),
    [
        ({"data": {"train": "/etc/passwd"}}, "data.train: unknown key"),
        ({"data": {"test": "/etc/passwd"}}, "data.test: unknown key"),
        ({"data": {"partitioner": {"kind": "iid", "clients": 2}}}, "data.partitioner: unknown key"),
        ({"model": {"path": "/home/owner/model"}}, "model.path: unknown key"),
        ({"model": {"name": "/home/owner/model"}}, "model.name: "),
        ({"model": {"name": "a/../b"}}, "model.name: "),
        ({"model": {"name": "package:os/x"}}, "model.name: "),
        ({"evaluation": {"plug_into": "/home"}}, "evaluation.plug_into: unknown key"),
        ({"federation": {"attack": {"kind": "alie", "fraction": 0.5}}}, "federation.attack: unknown key"),
        ({"output": {"tensorboard": True}}, "output: unknown key"),
        ({"run": {"name": "../x", "rounds": 1}}, "run.name: "),
        ({"data": {"label": "x" * 300}}, "data.label: "),
    ],
)
def test_a_device_knows_no_other_key(tables: dict[str, Any], what: str) -> None:
    came = {"schema": 1, "run": {"name": "t", "rounds": 1}, **tables}
    with pytest.raises(RunFileError, match=re.escape(what)):
        read_device_task(json.dumps(came))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema":9}', "[" * 100_000, " " * (1 << 20)])
def test_what_is_no_task_is_one_line(text: str) -> None:
    with pytest.raises(RunFileError) as refused:
        read_device_task(text)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000


def test_sections_of_a_device_take_no_key_that_a_run_file_has_not() -> None:
    """And those that they leave out are known: a new key of a run file is told once somebody says so."""
    left_out: dict[tuple[type[BaseModel], type[BaseModel]], set[str]] = {
        (DeviceData, DataSection): {
            "train",
            "test",
            "test_filter",
            "test_limit",
            "partitioner",
            "encoding",
            "separator",
            "quoting",
        },
        (DeviceModel, ModelSection): {"path", "device"},
        (DeviceFederation, FederationSection): {"clock", "attack"},
    }
    for (own, whole), keys in left_out.items():
        renamed = {"clients", "name"}
        assert own.model_fields.keys() - whole.model_fields.keys() <= renamed
        assert whole.model_fields.keys() - own.model_fields.keys() == keys
    assert RunConfig.model_fields.keys() - DeviceTask.model_fields.keys() == {"output"}
