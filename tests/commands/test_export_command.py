"""`fedpeft export` writes an adapter, or a merged model that computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpeft.config.run_file import load_run
from fedpeft.config.sections import ModelSection, PeftSection, RunConfig
from fedpeft.ledger.run_place import write_run
from fedpeft.models.attach import attach
from fedpeft.models.base_model import load_base, load_tokenizer
from fedpeft.models.export import export_adapter, load_adapter
from fedpeft.models.trainable import trainable_parameters
from tests.commands.calling import Call

IDS = torch.arange(3, 35).reshape(2, 16)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=IDS).logits
    return result


def a_run(folder: Path, **sections: Any) -> Path:
    """A run folder whose adapter was drawn at random instead of trained."""
    run = RunConfig.model_validate({"run": {"name": "drawn", "rounds": 1}, **sections})
    labels = len(run.data.labels) if run.data.labels else None
    model = attach(load_base(run.model, num_labels=labels), run.peft, task=run.model.task, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    folder.mkdir()
    export_adapter(model, folder / "adapter", base_name="embedded")
    write_run(folder, run)
    return folder


def test_export_copies_the_adapter(call: Call, tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "adapter"
    code, text, _ = call("export", str(tiny_run), "--out", str(out))
    assert code == 0
    assert str(out) in text.replace("\n", "")
    names = sorted(path.name for path in out.iterdir())
    assert names == sorted(path.name for path in (tiny_run / "adapter").iterdir())
    for name in names:
        assert (out / name).read_bytes() == (tiny_run / "adapter" / name).read_bytes()


def test_export_copies_without_a_run_file(call: Call, tiny_run: Path, tmp_path: Path) -> None:
    assert call("export", str(tiny_run), "--out", str(tmp_path / "one"))[0] == 0
    assert call("export", str(tmp_path / "one"), "--out", str(tmp_path / "two"))[0] == 0
    assert call("export", str(tmp_path / "one"), "--out", str(tmp_path / "three"), "--merge")[0] == 2
    assert not (tmp_path / "three").exists()


def test_export_merges_into_the_same_function(call: Call, tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    assert call("export", str(tiny_run), "--out", str(out), "--merge")[0] == 0
    section = load_run(tiny_run / "run.toml").model
    merged = logits(load_base(ModelSection(path=str(out))))
    adapted = logits(load_adapter(load_base(section), tiny_run / "adapter"))
    assert float((merged - adapted).abs().max()) < 1e-4  # logits reach 10 in float32
    assert not torch.allclose(merged, logits(load_base(section)), atol=1e-2)
    text = "Two roads: a, b"
    ours, theirs = (load_tokenizer(s) for s in (section, ModelSection(path=str(out))))
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]


def test_export_merges_a_classifier_with_its_labels(call: Call, tmp_path: Path) -> None:
    model = {"task": "sequence-classification"}
    run = a_run(tmp_path / "run", model=model, data={"labels": ["no", "yes", "perhaps"]})
    out = tmp_path / "merged"
    assert call("export", str(run), "--out", str(out), "--merge")[0] == 0
    assert json.loads((out / "config.json").read_text())["label2id"] == {"no": 0, "yes": 1, "perhaps": 2}
    section = ModelSection(path=str(out), task="sequence-classification")
    base = load_base(ModelSection(task="sequence-classification"), num_labels=3)
    adapted = logits(load_adapter(base, run / "adapter"))
    assert torch.allclose(logits(load_base(section, num_labels=3)), adapted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["prompt", "bottleneck"])
def test_export_refuses_to_merge_what_cannot_be_merged(call: Call, tmp_path: Path, method: str) -> None:
    run = a_run(tmp_path / "run", peft=PeftSection(method=method).model_dump())
    code, _, err = call("export", str(run), "--out", str(tmp_path / "out"), "--merge")
    assert code == 5
    assert err.count("\n") == 1
    assert "cannot be merged" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_export_overwrites_only_exports_and_only_when_told(
    call: Call, tiny_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / "inner").mkdir(parents=True)
    (out / "diary.txt").write_text("mine")
    for extra in ([], ["--force"]):
        code, _, err = call("export", str(tiny_run), "--out", str(out), *extra)
        assert code == 7
        assert "other files" in err
    assert (out / "diary.txt").read_text() == "mine"
    (out / "diary.txt").unlink()
    (out / "inner").rmdir()
    assert call("export", str(tiny_run), "--out", str(out))[0] == 0
    (out / "mark").write_text("")
    assert call("export", str(tiny_run), "--out", str(out))[0] == 7
    code, _, err = call("export", str(tiny_run), "--out", str(out), "--force")
    assert code == 7
    assert "(mark)" in err  # somebody's own file in an export
    (out / "mark").rename(out / "tokenizer.json")
    assert call("export", str(tiny_run), "--out", str(out), "--force")[0] == 0
    assert (out / "tokenizer.json").read_bytes() == (tiny_run / "adapter" / "tokenizer.json").read_bytes()


def test_export_never_writes_over_its_source(call: Call, tiny_run: Path) -> None:
    for out in (tiny_run, tiny_run / "adapter", tiny_run / "adapter" / "inner"):
        code, _, err = call("export", str(tiny_run), "--out", str(out), "--force")
        assert code == 7
        assert "elsewhere" in err
    assert (tiny_run / "adapter" / "adapter_config.json").is_file()
    assert (tiny_run / "run.toml").is_file()
