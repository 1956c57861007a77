"""Adapter folders: what is in them, repeatable bytes, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedpeft.config.sections import PeftSection
from fedpeft.errors import ModelError, StorageError
from fedpeft.models.attach import attach
from fedpeft.models.export import adapter_digest, export_adapter, load_adapter
from fedpeft.models.trainable import digest_frozen
from tests.models.tiny import TASKS, logits, tiny_base

SHOW = """
import sys
from pathlib import Path
from fedpeft.config.sections import PeftSection
from fedpeft.models.attach import attach
from fedpeft.models.export import adapter_digest, export_adapter
from fedpeft.models.trainable import digest_frozen
from tests.models.tiny import TASKS, tiny_base
for name in sys.argv[2:]:
    model = attach(tiny_base("bert"), PeftSection(method=name), task=TASKS["bert"], seed=3)
    export_adapter(model, Path(sys.argv[1]) / name, base_name="x")
    print(name, digest_frozen(model), adapter_digest(Path(sys.argv[1]) / name))
"""


def exported(folder: Path, method: str = "lora", kind: str = "llama") -> Path:
    model = attach(tiny_base(kind), PeftSection(method=method), task=TASKS[kind], seed=3)
    export_adapter(model, folder, base_name="owner/name")
    return folder


def test_a_folder_holds_config_and_weights_and_names_its_base(tmp_path: Path) -> None:
    folder = exported(tmp_path / "new" / "adapter")
    names = ["adapter_config.json", "adapter_model.safetensors", "generation_config.json"]
    assert sorted(p.name for p in folder.iterdir()) == names
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/name"
    assert config["peft_type"] == "LORA"
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["inference_mode"] is True


def test_no_path_of_this_machine_is_written(tmp_path: Path) -> None:
    base = tiny_base("llama")
    base.name_or_path = "/home/someone/models/base"  # type: ignore[assignment]  # where it was loaded from
    model = attach(base, PeftSection(method="lora"), task="causal-lm", seed=3)
    export_adapter(model, tmp_path, base_name="embedded")
    assert "someone" not in (tmp_path / "adapter_config.json").read_text()


def test_the_weights_are_float32_on_a_bfloat16_base_and_reload_exactly(tmp_path: Path) -> None:
    base = tiny_base("bert").bfloat16()
    model = attach(base, PeftSection(method="lora"), task=TASKS["bert"], seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) / 100)
    export_adapter(model, tmp_path, base_name="x")
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    again = load_adapter(tiny_base("bert").bfloat16(), tmp_path)
    assert torch.equal(logits(again, "bert"), logits(model, "bert"))


def test_the_digest_is_of_the_bytes(tmp_path: Path) -> None:
    folder = exported(tmp_path)
    before = adapter_digest(folder)
    assert adapter_digest(exported(tmp_path / "again")) == before
    config = folder / "adapter_config.json"
    config.write_text(config.read_text() + " ")
    assert adapter_digest(folder) != before


@pytest.mark.slow
def test_another_process_with_another_hash_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    names = ["lora", "full", "vera", "bitfit", "vblora", "fourierft", "bottleneck"]
    root = Path(__file__).resolve().parents[2]

    def shown(hash_seed: str) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(root)}
        command = [sys.executable, "-c", SHOW, str(tmp_path / hash_seed), *names]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    first = shown("1")
    assert first.count("\n") == len(names)
    assert first == shown("2")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_incomplete_folder_is_refused(tmp_path: Path, name: str) -> None:
    (exported(tmp_path) / name).unlink()
    with pytest.raises(ModelError, match=f"{name} is missing"):
        load_adapter(tiny_base("llama"), tmp_path)
    with pytest.raises(ModelError, match=f"{name} is missing"):
        adapter_digest(tmp_path)


@pytest.mark.parametrize("damage", ["config", "weights", "other base"])
def test_an_adapter_that_does_not_fit_is_one_line(tmp_path: Path, damage: str) -> None:
    folder = exported(tmp_path)
    if damage == "config":
        (folder / "adapter_config.json").write_text("{")
    elif damage == "weights":
        (folder / "adapter_model.safetensors").write_bytes(b"12345678")
    base = tiny_base("bert" if damage == "other base" else "llama")
    with pytest.raises(ModelError, match="does not fit this base model") as caught:
        load_adapter(base, folder)
    assert "\n" not in str(caught.value)


def test_weights_of_another_method_are_refused(tmp_path: Path) -> None:
    lora, ia3 = exported(tmp_path / "lora"), exported(tmp_path / "ia3", "ia3")
    (lora / "adapter_model.safetensors").write_bytes((ia3 / "adapter_model.safetensors").read_bytes())
    with pytest.raises(ModelError, match="does not fit this base model: its file has a strange tensor"):
        load_adapter(tiny_base("llama"), lora)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        exported(blocked / "adapter")


def test_loading_leaves_the_generator_alone_and_the_base_frozen(tmp_path: Path) -> None:
    folder = exported(tmp_path, "vera")
    before, untouched = torch.get_rng_state(), digest_frozen(tiny_base("llama"))
    base = tiny_base("llama")
    load_adapter(base, folder)
    assert torch.equal(before, torch.get_rng_state())
    assert untouched == digest_frozen(tiny_base("llama"))


@pytest.mark.parametrize(
    "more",
    [
        {"megatron_config": {"tensor_model_parallel_size": 1}, "megatron_core": "antigravity"},
        {"tokenizer_name_or_path": "/tmp/evil", "tokenizer_kwargs": {"trust_remote_code": True}},
        {"arrow_config": {"arrow_expert_num": 2}},
    ],
)
def test_a_configuration_that_would_load_something_else_is_refused(
    more: dict[str, object], tmp_path: Path
) -> None:
    """An adapter that was pulled from somebody's server is read before `peft` acts on it."""
    file = exported(tmp_path) / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **more}))
    with pytest.raises(ModelError, match="from elsewhere would be loaded"):
        load_adapter(tiny_base("llama"), tmp_path)
    assert "antigravity" not in sys.modules
