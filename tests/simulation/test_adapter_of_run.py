"""The adapter folder that a run leaves: complete, readable by others, and without a path of this machine."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from fedpeft.config.sections import ModelSection
from fedpeft.data.embedded import model_folder
from fedpeft.models.card import public_name
from tests.simulation.runs import simulated

TABLES: dict[str, Any] = {
    "run": {"name": "carded", "rounds": 1},
    "peft": {"method": "lora", "r": 2},
    "data": {"limit": 24, "test_limit": 4, "partitioner": {"kind": "iid", "clients": 2}},
    "training": {"steps": 1, "batch_size": 4},
    "evaluation": {"metrics": ["loss"], "bootstrap": 20},
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("carded") / "run"
    simulated(TABLES, out)
    return out / "adapter"


def test_everybody_may_read_it(adapter: Path) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in adapter.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer_config.json"} <= set(
        modes
    )
    assert set(modes.values()) == {0o644}


def test_it_names_no_path_of_this_machine(adapter: Path) -> None:
    here = {str(adapter.parents[1]), str(model_folder()), str(Path.home()), str(Path(__file__).parents[2])}
    for path in adapter.iterdir():
        content = path.read_bytes()
        assert [folder for folder in here if folder.encode() in content] == [], path.name


def test_its_tokenizer_is_the_one_that_rows_were_read_with(adapter: Path) -> None:
    ours, theirs = (AutoTokenizer.from_pretrained(str(folder)) for folder in (adapter, model_folder()))
    text = "date: 2021-03-04 -> 4 March"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]


def test_its_card_says_where_it_comes_from(adapter: Path) -> None:
    card = (adapter / "README.md").read_text()
    head = card.split("---")[1]
    assert 'library_name: "peft"' in head
    assert "base_model" not in head  # no hub name is known of it
    assert "| rounds | 1 of 1, strategy fedavg |" in card
    assert "| method | lora (r 2) |" in card
    assert "| differential privacy | none |" in card


@pytest.mark.parametrize(
    ("path", "name"),
    [("embedded", "embedded"), ("owner/name", "owner/name"), ("hub:owner/name", "owner/name")],
)
def test_a_base_is_known_by_its_hub_name(path: str, name: str) -> None:
    assert public_name(ModelSection(path=path)) == name


def test_a_base_in_a_folder_is_known_by_its_last_part(tmp_path: Path) -> None:
    (tmp_path / "my-llama").mkdir()
    assert public_name(ModelSection(path=str(tmp_path / "my-llama"))) == "my-llama"
    assert public_name(ModelSection(path="/not/here/my-llama")) == "my-llama"
