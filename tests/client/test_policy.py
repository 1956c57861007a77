"""The owner's word: what a run file says against what client.toml allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fedpeft.config.run_file import build_run
from fedpeft.config.sections import RunConfig
from fedpeft.errors import UsageError
from fedpeft.wire.failures import policy_keys
from fedpeft_client.client_settings import read_settings
from fedpeft_client.policy.owner_policy import (
    Policy,
    _data,
    fields_used,
    find_unwanted_metrics,
    objections,
    over_bytes,
)

LOCAL = {"kind": "local", "noise_multiplier": 2.0, "target_delta": 1e-5, "max_epsilon": 4.0, "clip_norm": 1.0}
RECORDS = {
    "kind": "record-level",
    "noise_multiplier": 2.0,
    "target_delta": 1e-5,
    "max_epsilon": 4.0,
    "max_grad_norm": 1.0,
    "sample_rate": 0.1,
    "expected_batch_size": 4,
}


def run(**tables: Any) -> RunConfig:
    return build_run({"run": {"name": "study", "rounds": 2}, **tables}, source="test")


CASES: dict[str, tuple[dict[str, Any], RunConfig, str]] = {
    "run": ({"runs": ["other"]}, run(), "'study' is not in policy.runs (other)"),
    "task": ({"tasks": ["sequence-classification"]}, run(), "'causal-lm' is not in policy.tasks"),
    "method": ({"methods": ["vera"]}, run(), "'lora' is not in policy.methods (vera)"),
    "training": ({"training": []}, run(), "'first-order' is not in policy.training (which is empty)"),
    "space": ({"spaces": ["seed-scalars"]}, run(), "'adapter-delta' is not in policy.spaces"),
    "stage": (
        {"stages": ["clip"]},
        run(stages=[{"kind": "ternary"}]),
        "stage 'ternary' is not in policy.stages",
    ),
    "no stage": (
        {"needs_stages": ["clip"]},
        run(),
        "stage 'clip', which policy.needs_stages asks for, is missing",
    ),
    "no privacy": ({"privacy": ["local"]}, run(), "promises no privacy, which policy.privacy asks for"),
    "no budget": (
        {"max_total_epsilon": 1.0},
        run(),
        "promises no privacy, which policy.max_total_epsilon asks",
    ),
    "other privacy": (
        {"privacy": ["record-level"]},
        run(privacy=LOCAL),
        "'local' is not in policy.privacy (record-level)",
    ),
    "single rows for persons": (
        {"user": ["patient", "household"]},
        run(privacy=RECORDS, data={"train": "x", "text": "{t}"}),
        "the run protects single rows; policy.user asks for patient or household",
    ),
    "another person": (
        {"user": ["patient"]},
        run(privacy=RECORDS, data={"train": "x", "text": "{t}", "user": "visit"}),
        "the run protects each 'visit'; policy.user asks for patient",
    ),
    "no promise for persons": (
        {"user": ["patient"]},
        run(),
        "promises no privacy, which policy.user asks for",
    ),
    "seeded": ({"privacy": ["local"]}, run(privacy=LOCAL | {"seeded": True}), "which protects nobody"),
    "little noise": ({"min_noise_multiplier": 2.5}, run(privacy=LOCAL), "noise_multiplier 2 is below"),
    "large budget": ({"max_run_epsilon": 3.5}, run(privacy=LOCAL), "max_epsilon 4 is above"),
    "large delta": (
        {"max_delta": 1e-6},
        run(privacy=LOCAL),
        "target_delta 1e-05 is above policy.max_delta = 1e-06",
    ),
    "no promise for a delta": (
        {"max_delta": 1e-6},
        run(),
        "the run promises no privacy, which policy.max_delta asks for",
    ),
    "many steps": ({"max_local_steps": 9}, run(training={"steps": 10}), "the run asks for 10 local steps"),
    "any steps": ({"max_local_steps": 9}, run(), "as many local steps as it likes"),
}


CASES |= {
    "filter": ({}, run(data={"train": "x", "text": "{t}", "filter": {"a": 1}}), "chooses among the rows"),
    "label map": (
        {"allow_label_maps": False},
        run(
            model={"task": "sequence-classification"},
            data={"train": "x", "text": "{t}", "label": "l", "labels": ["0", "1"]},
        ),
        "says which labels there are",
    ),
    "field of a template": (
        {"fields": ["t"]},
        run(data={"train": "x", "prompt": "{t}{ssn}", "answer": "{t}"}),
        "field 'ssn' is not in policy.fields (t)",
    ),
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_run_outside_the_policy_is_told_why(name: str) -> None:
    table, asked, words = CASES[name]
    (objection,) = objections(Policy.model_validate(table), asked)
    assert words in objection.text
    assert objection.key in policy_keys()
    assert objections(Policy(allow_filters=True), asked) == []


def test_a_run_inside_the_policy_is_let_in() -> None:
    policy = Policy(
        runs=("study",),
        tasks=("causal-lm",),
        methods=("lora",),
        training=("first-order",),
        spaces=("adapter-delta",),
        stages=("clip", "ternary"),
        needs_stages=("ternary",),
        privacy=("local",),
        min_noise_multiplier=2.0,
        max_run_epsilon=4.0,
        max_total_epsilon=4.0,
        max_local_steps=10,
    )
    asked = run(privacy=LOCAL, training={"steps": 10}, stages=[{"kind": "ternary"}])
    assert objections(policy, asked) == []


def test_persons_of_the_owners_fields_are_protected_and_so_is_all_of_a_device() -> None:
    policy = Policy(user=("patient", "household"))
    persons = run(privacy=RECORDS, data={"train": "x", "text": "{t}", "user": "household"})
    assert objections(policy, persons) == []
    assert objections(policy, run(privacy=LOCAL)) == []


def test_a_confined_worker_downloads_nothing() -> None:
    with pytest.raises(ValidationError, match="needs_confinement takes the worker's network"):
        Policy(needs_confinement=True, allow_download=True)


def test_all_objections_come_at_once() -> None:
    policy = Policy(runs=(), methods=(), privacy=("local",))
    assert len(objections(policy, run())) == 3


def test_bytes_add_up() -> None:
    assert over_bytes(Policy(max_bytes_per_day=100), 60, 40) is None
    over = over_bytes(Policy(max_bytes_per_day=100), 60, 41)
    assert over is not None
    assert "exceed policy.max_bytes_per_day = 100" in over.text


def test_every_key_of_a_policy_can_be_named_in_a_refusal_and_no_other() -> None:
    assert policy_keys() == set(Policy.model_fields)


def test_every_way_to_use_a_field_is_seen() -> None:
    data = run(
        model={"task": "sequence-classification"},
        data={
            "train": "x",
            "text": "{a} {b?}{?g}there{/g}",
            "label": "c",
            "labels": ["0", "1"],
            "filter": {"d": 1},
            "user": "e",
            "explode": "f",
        },
    ).data
    assert fields_used(data) == ["a", "b", "c", "d", "e", "f", "g"]
    policy = Policy(fields=("a", "b", "c", "e", "f", "g"), allow_filters=True)
    assert [objection.text.split()[1] for objection in _data(policy, data)] == ["'d'"]


def test_metrics_are_refused_by_name() -> None:
    refused = find_unwanted_metrics(Policy(metrics=("steps",)), {"loss": 0.5, "steps": 3.0, "alpha": 1.0})
    assert [objection.text.split()[1] for objection in refused] == ["'alpha'", "'loss'"]
    assert find_unwanted_metrics(Policy(), {"loss": 0.5}) == []


def test_only_keys_of_the_table_are_told() -> None:
    with pytest.raises(ValidationError, match="is no key of"):
        Policy(tell_limits=("max_task",))


def test_client_toml(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    config = tmp_path / "client.toml"
    config.write_text('server = "host:7070"\ndata = "rows.jsonl"\n[policy]\nmax_task_s = 5\n')
    settings = read_settings(config, {"server": "other:7071"})
    assert settings.server == "other:7071"
    assert settings.data == tmp_path / "rows.jsonl"
    assert settings.policy.max_task_s == 5.0


BAD: dict[str, tuple[str, str]] = {
    "nothing": ("", "server is needed"),
    "no port": ('server = "host"\ndata = "."', "is no address; give HOST:PORT"),
    "port": ('server = "host:70000"\ndata = "."', "is no address"),
    "no data": ('server = "host:1"\ndata = "missing.jsonl"', "there is no such file or folder"),
    "key": ('server = "host:1"\ndata = "."\nserv = 1', "serv: unknown key"),
    "policy": ('server = "host:1"\ndata = "."\n[policy]\nmax_task_s = -1', "policy.max_task_s"),
    "delta": ('server = "host:1"\ndata = "."\n[policy]\nmax_delta = 0.01', "policy.max_delta"),
    "toml": ("server = ", "cannot be read as TOML"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_settings_are_one_line(name: str, tmp_path: Path) -> None:
    text, words = BAD[name]
    config = tmp_path / "client.toml"
    config.write_text(text)
    with pytest.raises(UsageError) as raised:
        read_settings(config, {})
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_unknown_policies_are_refused() -> None:
    with pytest.raises(ValidationError):
        Policy.model_validate({"max_epsilonn": 1.0})


def test_a_link_to_rows_keeps_its_name_and_a_strange_home_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "0c1fe").write_text('{"text": "x"}\n')
    (tmp_path / "north.jsonl").symlink_to("0c1fe")
    config = tmp_path / "client.toml"
    config.write_text('server = "localhost:9440"\ndata = "north.jsonl"\n')
    assert read_settings(config, {}).data == tmp_path / "north.jsonl"
    config.write_text('server = "localhost:9440"\ndata = "~nobody-of-this-name/rows.jsonl"\n')
    with pytest.raises(UsageError, match="no such file"):
        read_settings(config, {})
