"""`fedpeft keys` explains every key, and its schema takes what run files hold."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedpeft.commands.named_options import run_schema
from fedpeft.config.key_reference import tables_of, to_toml
from fedpeft.config.sections import RunConfig
from fedpeft.stages import STAGES
from fedpeft_server.ops.server_settings import ServerSettings
from tests.commands.calling import Call

ROOT = Path(__file__).resolve().parents[2]
RUN_FILES = sorted([*(ROOT / "simulations").glob("*.toml"), ROOT / "server" / "three_agents.toml"])


def shown_json(call: Call, *words: str) -> Any:
    code, out, _ = call("keys", *words)
    assert code == 0
    return json.loads(out)


def test_a_key_is_shown_with_all_that_is_known_of_it(call: Call) -> None:
    code, out, _ = call("keys", "federation.deadline_s")
    assert code == 0
    assert "[federation]" in out
    assert "deadline_s  (number > 0, s)" in out
    assert "Default: none." in " ".join(out.split())
    assert "quorum" not in out


def test_a_table_is_shown_with_those_within_it(call: Call) -> None:
    names = [table["name"] for table in shown_json(call, "federation.buffer", "--json")]
    assert names == ["federation.buffer", "federation.buffer.staleness_weight"]


def test_all_tables_are_shown(call: Call) -> None:
    headings = [line for line in call("keys")[1].splitlines() if line.startswith("[")]
    expected = [table.heading for table in tables_of(RunConfig) if table.name]
    assert [line.split()[0] for line in headings] == expected
    assert 'kind = "record-level"' in "\n".join(headings)


def test_names_stand_with_the_options_that_come_with_them(call: Call) -> None:
    out = " ".join(call("keys", "stages")[1].split())
    assert all(name in out for name in STAGES)
    assert 'top-k: density = 0.1, tensors = ["*"], error_feedback = false' in out
    assert "num_malicious_nodes = 0" in call("keys", "federation.strategy")[1]
    assert "adafactor" in call("keys", "training.optimizer")[1]


def test_settings_of_server_and_client(call: Call) -> None:
    tables = shown_json(call, "--of", "server", "--json")
    assert [table["name"] for table in tables] == ["", "tls", "limits", "log", "metrics"]
    (limits,) = shown_json(call, "limits", "--of", "server", "--json")
    turn = next(key for key in limits["keys"] if key["name"] == "turn_s")
    assert (turn["unit"], turn["default"]) == ("s", "60.0")
    (policy,) = shown_json(call, "policy", "--of", "client", "--json")
    assert {key["unit"] for key in policy["keys"] if key["name"].endswith("_epsilon")} == {"epsilon"}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["lr"], "did you mean training.lr?"),
        (["federation.bufer"], "did you mean federation.buffer?"),
        (["training.lr", "--schema"], "leave out --json and SECTION"),
        (["--of", "agent"], "give run, server, client"),
    ],
)
def test_what_is_not_there_is_one_line(words: list[str], line: str, call: Call) -> None:
    code, _, said = call("keys", *words)
    assert code == 2
    assert said.count("\n") == 1
    assert line in said


def test_defaults_are_what_a_file_would_say() -> None:
    for table in tables_of(ServerSettings):
        for key in table.keys:
            if key.default:
                tomllib.loads(f"{key.name} = {key.default}")
    assert to_toml({"kind": "all", "n": [1, True]}) == '{ kind = "all", n = [1, true] }'


@pytest.fixture(scope="module")
def validator() -> Any:
    """A judge of run files by the schema alone."""
    jsonschema = pytest.importorskip("jsonschema")  # brought by ray
    schema = json.loads(json.dumps(run_schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_the_schema_takes_our_run_files(path: Path, validator: Any) -> None:
    assert [error.message for error in validator.iter_errors(tomllib.loads(path.read_text()))] == []


@pytest.mark.parametrize(
    "change",
    [
        {"run": {"name": "a", "rounds": 0}},
        {"run": {"name": "a"}},
        {"training": {"lr": "fast"}},
        {"training": {"learning_rate": 0.1}},
        {"federation": {"mode": "eventual"}},
        {"federation": {"buffer": {"size": 2}}},
        {"privacy": {"kind": "record-level", "noise_multiplier": 1.0}},
        {"stages": [{"density": 0.1}]},
    ],
    ids=str,
)
def test_the_schema_refuses_what_a_run_file_may_not_hold(change: dict[str, Any], validator: Any) -> None:
    sound = {"run": {"name": "a", "rounds": 1}}
    assert validator.is_valid(sound)
    assert not validator.is_valid(sound | change)


def test_editors_complete_names_and_options(validator: Any) -> None:
    definitions = validator.schema["$defs"]
    assert "lora" in definitions["PeftSection"]["properties"]["method"]["anyOf"][0]["enum"]
    assert "rouge-l" in definitions["EvaluationSection"]["properties"]["metrics"]["items"]["anyOf"][0]["enum"]
    variants = {each.get("title"): each for each in definitions["StageSection"]["anyOf"]}
    assert "error_feedback" in variants["top-k"]["properties"]
    assert variants["clip"]["required"] == ["kind", "clip_norm"]
    assert {"required": []} in definitions["StageSection"]["anyOf"]  # other packages may add stages
    strategies = {each.get("title"): each for each in definitions["StrategySection"]["anyOf"]}
    assert "beta" in strategies["fedtrimmedavg"]["properties"]


def test_the_schema_is_printed(call: Call) -> None:
    assert shown_json(call, "--schema") == json.loads(json.dumps(run_schema()))
    assert "policy" in shown_json(call, "--schema", "--of", "client")["properties"]


def test_keys_leaves_torch_alone() -> None:
    heavy = "[name for name in ('torch', 'sqlalchemy') if name in sys.modules]"
    call = f"try: main(['keys', 'run'])\nfinally: print({heavy})"
    code = f"import sys; from fedpeft.cli import main\n{call}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
