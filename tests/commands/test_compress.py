"""Adapters as `.fpz` files: there and back, merged, and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fedpeft.codec import read_expert
from fedpeft.commands.compress import compress_command
from fedpeft.config.run_file import build_run, load_run, run_toml
from fedpeft.config.sections import ModelSection
from fedpeft.errors import UsageError
from fedpeft.ledger.run_place import write_run
from fedpeft.models.attach import attach
from fedpeft.models.base_model import load_base
from fedpeft.models.export import export_adapter, load_adapter
from fedpeft.models.trainable import trainable_parameters
from fedpeft.runtime.randomness import derive_seed
from tests.commands.calling import Call

WEIGHTS = "adapter_model.safetensors"
TABLES: dict[str, Any] = {"run": {"name": "drawn", "rounds": 1}, "peft": {"method": "lora", "r": 4}}


def run_folder(folder: Path, seed: int, **peft: Any) -> Path:
    """A run folder without checkpoints, whose adapter was moved at random from where the run would begin."""
    run = build_run({**TABLES, "peft": {**TABLES["peft"], **peft}}, source="test")
    begun = derive_seed(run.run.seed, "adapter")
    model = attach(load_base(run.model), run.peft, task=run.model.task, seed=begun)
    folder.mkdir()
    export_adapter(model, folder / "untrained", base_name="embedded")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    export_adapter(model, folder / "adapter", base_name="embedded")
    write_run(folder, run)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("experts")
    return [run_folder(folder / str(seed), seed) for seed in (1, 2)]


def arrays(folder: Path) -> dict[str, np.ndarray]:
    return {name: array.astype(np.float64) for name, array in load_file(folder / WEIGHTS).items()}


def changes(run: Path) -> dict[str, np.ndarray]:
    trained, untrained = arrays(run / "adapter"), arrays(run / "untrained")
    return {name: trained[name] - untrained[name] for name in trained}


def loads_in_peft(folder: Path) -> None:
    model: Any = load_adapter(load_base(ModelSection()), folder)
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=torch.arange(3, 19)[None]).logits).all()


def test_compress_keeps_the_signs_of_the_largest_changes(
    call: Call, runs: list[Path], tmp_path: Path
) -> None:
    file, out = tmp_path / "one.fpz", tmp_path / "one"
    code, text, _ = call("compress", str(runs[0]), "--out", str(file), "--density", "0.25")
    assert code == 0
    assert "smaller than bf16" in text
    assert "start" not in text
    assert call("decompress", str(file), "--out", str(out))[0] == 0
    untrained, restored = arrays(runs[0] / "untrained"), arrays(out)
    assert restored.keys() == untrained.keys()
    for name, change in changes(runs[0]).items():
        flat = change.ravel()
        order = np.argsort(-np.abs(flat.astype(np.float32)), kind="stable")[: round(0.25 * flat.size)]
        wanted = np.zeros(flat.size)
        wanted[order] = np.sign(flat[order]) * np.abs(flat[order]).mean()
        assert np.allclose(restored[name] - untrained[name], wanted.reshape(change.shape), atol=1e-6)
    config, before = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (out, runs[0] / "adapter")
    )
    assert config == before
    loads_in_peft(out)


def test_the_file_says_what_it_belongs_to(call: Call, runs: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "one.fpz"
    assert call("compress", str(runs[0]), "--out", str(file))[0] == 0
    metadata = read_expert(file).metadata
    assert len(metadata["base_digest"]) == 64
    assert metadata["adapter_config"]["r"] == 4
    assert metadata["method"] == {"kind": "ternary", "density": 0.1}
    assert str(tmp_path) not in json.dumps(dict(metadata))


def test_raw_compresses_the_weights_themselves(call: Call, runs: list[Path], tmp_path: Path) -> None:
    file, out = tmp_path / "raw.fpz", tmp_path / "raw"
    code, text, _ = call("compress", str(runs[0]), "--out", str(file), "--raw", "--density", "1")
    assert code == 0
    assert "start       unknown" in text
    assert call("decompress", str(file), "--out", str(out))[0] == 0
    for name, array in arrays(runs[0] / "adapter").items():
        assert np.allclose(arrays(out)[name], np.sign(array) * np.abs(array).mean(), rtol=1e-5)


def test_an_adapter_from_elsewhere_is_compressed_as_it_is(
    call: Call, runs: list[Path], tmp_path: Path
) -> None:
    shutil.copytree(runs[0] / "adapter", tmp_path / "lonely")
    code, text, _ = call("compress", str(tmp_path / "lonely"), "--out", str(tmp_path / "l.fpz"))
    assert code == 0
    assert "start       unknown" in text


def test_what_never_moved_costs_next_to_nothing(call: Call, tmp_path: Path) -> None:
    """VeRA's shared projections are frozen: most of its file, and none of what was learned."""
    run, file, out = run_folder(tmp_path / "vera", 1, method="vera", r=16), tmp_path / "v.fpz", tmp_path / "v"
    assert call("compress", str(run), "--out", str(file), "--density", "0.5")[0] == 0
    frozen = {name for name, change in changes(run).items() if not change.any()}
    size = sum(arrays(run / "adapter")[name].size for name in frozen)
    assert size > 5000
    assert file.stat().st_size < 4 * size
    assert call("decompress", str(file), "--out", str(out))[0] == 0
    for name in frozen:
        assert np.array_equal(arrays(out)[name], arrays(run / "adapter")[name])
    loads_in_peft(out)


def test_indices_are_not_thinned_out(call: Call, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "shira", 1, method="shira")
    code, _, err = call("compress", str(run), "--out", str(tmp_path / "s.fpz"))
    assert code == 5
    assert "holds integers" in err
    assert err.count("\n") == 1


def test_a_trained_run_there_and_back(call: Call, tiny_run: Path, tmp_path: Path) -> None:
    """With a first checkpoint: the start that is drawn again is the one that the run began with."""
    file = tmp_path / "t.fpz"
    assert call("compress", str(tiny_run), "--out", str(file), "--density", "1")[0] == 0
    assert call("decompress", str(file), "--out", str(tmp_path / "drawn"))[0] == 0
    assert call("decompress", str(file), "--out", str(tmp_path / "kept"), "--init", str(tiny_run))[0] == 0
    drawn, kept, trained = (
        arrays(folder) for folder in (tmp_path / "drawn", tmp_path / "kept", tiny_run / "adapter")
    )
    for name, array in trained.items():
        assert np.array_equal(drawn[name], kept[name])
        assert np.abs(drawn[name] - array).max() < 0.02  # one step of the demo's learning rate


@pytest.mark.parametrize(
    "method", ["average", "task-arithmetic", "ties", "dare", "lines", "pcb", "breadcrumbs"]
)
def test_merge_writes_what_peft_loads(call: Call, runs: list[Path], tmp_path: Path, method: str) -> None:
    out = tmp_path / method
    paths = [str(run) for run in runs]
    assert call("merge", *paths, "--method", method, "--out", str(out))[0] == 0
    loads_in_peft(out)
    merged, untrained = arrays(out), arrays(runs[0] / "untrained")
    assert any(np.abs(merged[name] - untrained[name]).max() > 1e-4 for name in merged)


def test_merge_acts_on_what_was_learned(call: Call, runs: list[Path], tmp_path: Path) -> None:
    one, two = changes(runs[0]), changes(runs[1])
    untrained = arrays(runs[0] / "untrained")
    paths = [str(run) for run in runs]
    average = tmp_path / "average"
    assert call("merge", *paths, "--weights", "3,1", "--out", str(average))[0] == 0
    added = tmp_path / "added"
    options = ["--method", "task-arithmetic", "--set", "lam=0.5", "--out", str(added)]
    assert call("merge", *paths, *options)[0] == 0
    for name, start in untrained.items():
        assert np.allclose(arrays(average)[name], start + (3 * one[name] + two[name]) / 4, atol=1e-6)
        assert np.allclose(arrays(added)[name], start + 0.5 * (one[name] + two[name]), atol=1e-6)


def test_compressed_and_plain_adapters_merge(call: Call, runs: list[Path], tmp_path: Path) -> None:
    file, alone, out = tmp_path / "one.fpz", tmp_path / "alone", tmp_path / "both"
    assert call("compress", str(runs[0]), "--out", str(file), "--density", "0.3")[0] == 0
    assert call("decompress", str(file), "--out", str(alone))[0] == 0
    code, text, _ = call("merge", str(file), str(runs[1]), "--out", str(out))
    assert code == 0
    assert "start" not in text
    for name, array in arrays(alone).items():
        assert np.allclose(arrays(out)[name], (array + arrays(runs[1] / "adapter")[name]) / 2, atol=1e-6)


def test_adapters_of_different_kinds_are_refused(call: Call, runs: list[Path], tmp_path: Path) -> None:
    other = run_folder(tmp_path / "other", 3, lora_alpha=99)
    out = tmp_path / "out"
    code, _, err = call("merge", str(runs[0]), str(other), "--out", str(out))
    assert code == 5
    assert "lora_alpha" in err
    assert err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "needle"),
    [
        (["--method", "blend"], 8, "choose one of average"),
        (["--method", "ties", "--set", "lambda=1"], 8, "lambda"),
        (["--method", "ties", "--set", "lam"], 2, "lam=0.5"),
        (["--weights", "1"], 8, "1 weights for 2"),
        (["--weights", "a,b"], 2, "2,1,1"),
        (["--select"], 2, "--run"),
    ],
)
def test_merge_says_what_it_needs(
    call: Call, runs: list[Path], tmp_path: Path, arguments: list[str], code: int, needle: str
) -> None:
    came, _, err = call("merge", *[str(run) for run in runs], "--out", str(tmp_path / "out"), *arguments)
    assert came == code
    assert needle in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_one_adapter_is_none_to_merge(call: Call, runs: list[Path], tmp_path: Path) -> None:
    assert call("merge", str(runs[0]), "--out", str(tmp_path / "out"))[0] == 2


def test_compress_refuses_what_it_cannot_do(call: Call, runs: list[Path], tmp_path: Path) -> None:
    run, file = str(runs[0]), tmp_path / "one.fpz"
    assert call("compress", run, "--out", str(tmp_path / "one.zip"))[0] == 2
    assert call("compress", str(tmp_path / "none"), "--out", str(file))[0] == 2
    for bad, needle in (
        (["--density", "0"], "density"),
        (["--method", "cubic"], "cubic"),
        (["--alpha", "2"], "alpha"),
    ):
        code, _, err = call("compress", run, "--out", str(file), *bad)
        assert code == 2
        assert needle in err
    assert not file.exists()
    assert call("compress", run, "--out", str(file))[0] == 0
    assert call("compress", run, "--out", str(file))[0] == 7
    assert call("compress", run, "--out", str(file), "--force")[0] == 0


def test_a_damaged_file_is_refused(call: Call, runs: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "one.fpz"
    assert call("compress", str(runs[0]), "--out", str(file))[0] == 0
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(bytes(content))
    code, _, err = call("decompress", str(file), "--out", str(tmp_path / "out"))
    assert code == 8
    assert "corrupt" in err
    assert not (tmp_path / "out").exists()
    assert call("decompress", str(tmp_path / "none.fpz"), "--out", str(tmp_path / "out"))[0] == 2


def test_another_start_than_the_files_own_is_refused(call: Call, runs: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "one.fpz"
    assert call("compress", str(runs[0]), "--out", str(file))[0] == 0
    other = tmp_path / "elsewhere"
    shutil.copytree(runs[0], other)
    write_run(other, load_run(other / "run.toml", ["run.seed=5"]))
    code, _, err = call("decompress", str(file), "--out", str(tmp_path / "out"), "--init", str(other))
    assert code == 5
    assert "untrained adapter has digest" in err


@pytest.mark.slow
def test_select_chooses_on_held_out_rows(call: Call, tiny_run: Path, tmp_path: Path) -> None:
    """A run of one step goes in the right direction: of twice its change times lam, more is better."""
    run_file = tmp_path / "loss.toml"
    run_file.write_text(run_toml(load_run(tiny_run / "run.toml", ["evaluation.metrics=['loss']"])))
    arguments = ["--method", "task-arithmetic", "--run", str(run_file), "--select"]
    code, text, _ = call("merge", str(tiny_run), str(tiny_run), *arguments, "--out", str(tmp_path / "out"))
    assert code == 0
    assert "lam=1.0" in text


def test_numbers_out_of_range_are_the_command_lines_own(tmp_path: Path) -> None:
    """Exit code 2 and the option's name, as for every mistake on a command line."""
    for density, alpha, words in ((7.0, None, "--density"), (0.5, "-1", "--alpha")):
        out = tmp_path / "x.fpz"
        with pytest.raises(UsageError, match=words):
            compress_command(
                tmp_path, out, density=density, method="compeft", alpha=alpha, raw=True, force=False
            )
