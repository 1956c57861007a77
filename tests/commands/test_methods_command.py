"""`fedpeft methods` lists every name a run file can hold, and needs no torch for it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, get_args

import pytest

from fedpeft.aggregation.lora_rules import LORA_RULES
from fedpeft.aggregation.staleness import WEIGHTS
from fedpeft.attacks import ATTACKS
from fedpeft.config.sections import ModelSection, PartitionerSection, SamplingSection
from fedpeft.evaluation.metrics import METRICS
from fedpeft.models.methods import METHODS
from fedpeft.privacy.kinds import KINDS
from fedpeft.rounds.strategy_table import RULES
from fedpeft.spaces import SPACES
from fedpeft.stages import STAGES
from fedpeft.training.lean import SAVERS
from fedpeft.training.optimizers import OPTIMIZERS, SCHEDULES
from fedpeft.training.zeroth_rules import RULES as ZEROTH_RULES
from tests.commands.calling import Call


def kinds(section: Any, key: str) -> set[str]:
    return set(get_args(section.model_fields[key].annotation))


TABLES: dict[str, set[str]] = {
    "peft.method": set(METHODS),
    "model.quantization": kinds(ModelSection, "quantization"),
    "data.partitioner": kinds(PartitionerSection, "kind"),
    "training.optimizer": set(OPTIMIZERS),
    "training.schedule": set(SCHEDULES),
    "training (memory)": set(SAVERS),
    "training.rule": set(ZEROTH_RULES),
    "space": set(SPACES),
    "stages": set(STAGES),
    "federation.strategy": set(RULES),
    "federation.attack": set(ATTACKS),
    "federation.lora_rule": set(LORA_RULES),
    "federation.sampling": kinds(SamplingSection, "kind"),
    "federation.buffer.staleness_weight": set(WEIGHTS),
    "privacy": set(KINDS),
    "evaluation.metrics": set(METRICS),
}


@pytest.fixture
def listed(call: Call) -> dict[str, list[dict[str, Any]]]:
    code, out, _ = call("methods", "--json")
    assert code == 0
    sections: dict[str, list[dict[str, Any]]] = json.loads(out)
    return sections


def test_methods_lists_every_table(listed: dict[str, list[dict[str, Any]]]) -> None:
    assert {key: {entry["name"] for entry in entries} for key, entries in listed.items()} == TABLES


def test_methods_says_something_of_each(listed: dict[str, list[dict[str, Any]]]) -> None:
    for entries in listed.values():
        for entry in entries:
            assert 10 < len(entry["summary"]) < 120
            assert "\n" not in entry["summary"]


def test_methods_flags_what_matters(listed: dict[str, list[dict[str, Any]]]) -> None:
    flags = {entry["name"]: set(entry["flags"]) for entry in listed["peft.method"]}
    assert "linear" in flags["ffa-lora"]
    assert "linear" not in flags["lora"]
    assert {"no merge", "linear"} <= flags["prompt"]
    assert "needs biases" in flags["bitfit"]
    flags = {entry["name"]: set(entry["flags"]) for entry in listed["evaluation.metrics"]}
    assert flags["rouge-l"] == {"causal-lm only", "generates"}
    assert flags["loss"] == set()


def test_methods_for_people(call: Call) -> None:
    code, out, _ = call("methods")
    assert code == 0
    lines = out.splitlines()
    assert next(line for line in lines if line.startswith("  ffa-lora ")).endswith("[linear]")
    assert len([line for line in lines if line.startswith("  ")]) == sum(map(len, TABLES.values()))


def test_methods_leaves_torch_alone() -> None:
    call = "try: main(['methods'])\nfinally: print('torch' in sys.modules)"
    code = f"import sys; from fedpeft.cli import main\n{call}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
