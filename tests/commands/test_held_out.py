"""Choosing on the clients' held-out rows, against the plain way: try everything, evaluate, take the best."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedpeft.codec.ternary import ALPHA_GRID
from fedpeft.commands.experts import read_adapter
from fedpeft.commands.held_out import AdapterScores, with_held_out_test_set
from fedpeft.commands.merge import LAM
from fedpeft.config.run_file import build_run, load_run, run_toml
from fedpeft.errors import ModelError, PrivacyError
from tests.commands.calling import Call

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def by_loss(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run's file with the loss as its first metric; its clients' held-out rows are all it has."""
    path = tmp_path_factory.mktemp("by-loss") / "run.toml"
    run = load_run(tiny_run / "run.toml", ["evaluation.metrics=['loss']"])
    assert run.data.test is None
    path.write_text(run_toml(run))
    return path


@pytest.fixture(scope="module")
def other(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run's adapter, moved elsewhere."""
    folder = tmp_path_factory.mktemp("other") / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((tiny_run / "adapter" / "adapter_config.json").read_bytes())
    rng = np.random.default_rng(0)
    weights = load_file(tiny_run / "adapter" / WEIGHTS)
    moved = {
        name: array + np.float32(0.1) * rng.standard_normal(array.shape, np.float32)
        for name, array in weights.items()
    }
    save_file(moved, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def evaluated(call: Call, adapter: Path, run_file: Path) -> float:
    code, text, _ = call("evaluate", str(adapter), "--run", str(run_file), "--json")
    assert code == 0
    return float(json.loads(text)["scores"]["loss"]["value"])


def test_adapters_on_one_loaded_base_score_as_each_on_its_own(
    call: Call, tiny_run: Path, other: Path, by_loss: Path
) -> None:
    adapters = [tiny_run / "adapter", other, tiny_run / "adapter"]
    sources = [read_adapter(path) for path in adapters]
    scores = AdapterScores(with_held_out_test_set(load_run(by_loss)), sources[0].config)
    found = [scores.of(source.weights)["loss"] for source in sources]
    assert found == [evaluated(call, path, by_loss) for path in adapters]
    assert found[0] != found[1]
    assert scores.primary == "loss"
    assert scores.gain(sources[1].weights) == -found[1]
    with pytest.raises(ModelError, match="is needed"):
        scores.of({name: array[:1] for name, array in sources[0].weights.items()})


def test_private_rows_choose_nothing() -> None:
    privacy = {"kind": "client-level", "clip_norm": 1.0, "noise_multiplier": 1.0}
    privacy |= {"target_delta": 1e-5, "max_epsilon": 8.0}
    run = build_run({"run": {"name": "hidden", "rounds": 1}, "privacy": privacy}, source="x")
    with pytest.raises(PrivacyError, match="hidden is private"):
        with_held_out_test_set(run)


@pytest.mark.slow
def test_merge_selects_what_trying_everything_finds(
    call: Call, tiny_run: Path, other: Path, by_loss: Path, tmp_path: Path
) -> None:
    both = [str(tiny_run / "adapter"), str(other), "--method", "breadcrumbs"]
    losses = {}
    for lam in LAM:
        out = tmp_path / f"{lam}"
        assert call("merge", *both, "--set", f"lam={lam}", "--out", str(out))[0] == 0
        losses[lam] = evaluated(call, out, by_loss)
    code, text, _ = call("merge", *both, "--select", "--run", str(by_loss), "--out", str(tmp_path / "chosen"))
    assert code == 0
    best = min(losses, key=lambda lam: losses[lam])
    assert f"lam={best}" in text
    assert len(set(losses.values())) == len(LAM)
    one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("chosen", f"{best}"))
    assert all(np.array_equal(one[name], two[name]) for name in two)


@pytest.mark.slow
def test_compress_searches_what_trying_everything_finds(
    call: Call, tiny_run: Path, by_loss: Path, tmp_path: Path
) -> None:
    options = ["--density", "0.2", "--method", "compeft"]
    losses = {}
    for alpha in ALPHA_GRID:
        file, out = tmp_path / f"{alpha}.fpz", tmp_path / f"{alpha}"
        assert call("compress", str(tiny_run), *options, "--alpha", f"{alpha}", "--out", str(file))[0] == 0
        assert call("decompress", str(file), "--out", str(out))[0] == 0
        losses[alpha] = evaluated(call, out, by_loss)
    file = tmp_path / "searched.fpz"
    code, text, _ = call("compress", str(tiny_run), *options, "--alpha", "search", "--out", str(file))
    assert code == 0
    best = min(losses, key=lambda alpha: losses[alpha])
    assert f"alpha       {best:g}," in text
    assert len(set(losses.values())) == len(ALPHA_GRID)
    assert call("decompress", str(file), "--out", str(tmp_path / "searched"))[0] == 0
    one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("searched", f"{best}"))
    assert all(np.allclose(one[name], two[name], rtol=1e-6, atol=1e-9) for name in two)  # a scale's rounding
