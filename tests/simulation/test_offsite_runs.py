"""A run on an emulator: clients without the full model, and scores of both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedpeft.config.run_file import build_run
from fedpeft.config.sections import ModelSection
from fedpeft.data.embedded import model_folder
from fedpeft.models.base_model import load_tokenizer
from fedpeft.models.offsite import make_emulator, whole_model
from fedpeft.planning.preflight import problems_of
from tests.simulation.runs import simulated


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, full = tmp_path_factory.mktemp("emulator"), str(model_folder())
    make_emulator(whole_model(full, "causal-lm"), folder, path=full, pad=1, middle=1)
    load_tokenizer(ModelSection()).save_pretrained(folder)
    return folder


def tables(emulator: Path, plug_into: str | None) -> dict[str, Any]:
    evaluation = {"metrics": ["loss"], "bootstrap": 2} | ({"plug_into": plug_into} if plug_into else {})
    return {
        "run": {"name": "offsite", "rounds": 1},
        "model": {"path": str(emulator)},
        "peft": {"method": "lora", "r": 4},
        "data": {"limit": 24, "partitioner": {"kind": "iid", "clients": 2}},
        "training": {"steps": 2, "batch_size": 4, "lr": 1e-3},
        "evaluation": evaluation,
    }


def test_both_models_are_scored_and_the_plugged_adapter_is_there(emulator: Path, tmp_path: Path) -> None:
    result = simulated(tables(emulator, str(model_folder())), tmp_path / "run")
    scores = {line.key: line.scores["loss"].value for line in result.summary.lines}
    assert {"start", "federated", "full-model", "plugged-in"} <= set(scores)
    plain = simulated(tables(model_folder(), None), tmp_path / "plain")
    start = {line.key: line.scores["loss"].value for line in plain.summary.lines}["start"]
    assert scores["full-model"] == start, "the same rows and the same model, as a run of its own scores them"
    assert scores["full-model"] != scores["start"], "layers were left out of the emulator"
    assert scores["plugged-in"] != scores["full-model"]
    config = json.loads((tmp_path / "run" / "plugged-in" / "adapter_config.json").read_text())
    layers = {name.split("layers.")[1].split(".")[0] for name in config["target_modules"]}
    assert layers == {"0", "3"}
    assert "plugged into full model" in (tmp_path / "run" / "report.html").read_text()


def test_without_the_full_model_the_emulator_alone_is_scored(emulator: Path, tmp_path: Path) -> None:
    result = simulated(tables(emulator, "./elsewhere"), tmp_path / "run")
    assert {line.key for line in result.summary.lines} == {"start", "federated"}


def test_what_has_no_place_in_the_full_model_is_refused(emulator: Path, tmp_path: Path) -> None:
    table = tables(emulator, None)
    table["peft"] = {"method": "prefix"}
    (problem,) = problems_of(build_run(table, source="test"))
    assert "has no place in the full model" in problem
    plain = tables(shutil.copytree(model_folder(), tmp_path / "plain"), str(model_folder()))
    (problem,) = problems_of(build_run(plain, source="test"))
    assert problem.startswith("evaluation.plug_into: the base is no emulator")
