"""A run ends well only if its adapter folder makes the model that was trained."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedpeft.config.run_file import build_run
from fedpeft.errors import ModelError
from fedpeft.ledger import RunFolder
from fedpeft.reporting.plain import PlainProgress
from fedpeft.simulation.engine import simulate
from tests.models.tiny import saved, tiny_base
from tests.simulation.runs import resumed


class Overwriting(PlainProgress):
    """A display whose user saves other weights over the base while the run writes its adapter."""

    def __init__(self, base: Path) -> None:
        super().__init__(Console(file=io.StringIO()))
        self._base = base

    def setup(self, step: str) -> None:
        if step == "writing adapter and report":
            tiny_base("llama", seed=1).save_pretrained(self._base)  # type: ignore[operator]  # untyped


def test_a_run_whose_adapter_makes_another_model_is_not_finished(
    tables: dict[str, Any], tmp_path: Path
) -> None:
    base = saved("llama", tmp_path / "base")
    shutil.copytree(base, tmp_path / "copy")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"q": "w{n} w{n + 1}", "a": "w{n + 2}"}}\n' for n in range(3, 40)))
    tables["model"] = {"path": str(base)}
    tables["data"] = {
        "train": str(rows),
        "prompt": "{q} ",
        "answer": "{a}",
        "max_length": 32,
        "partitioner": {"kind": "iid", "clients": 2},
    }
    tables["evaluation"] = {"metrics": ["loss"], "baselines": False}
    run = build_run(tables, (), source="test")

    with (
        RunFolder.create(tmp_path / "run", run) as folder,
        Overwriting(base) as progress,
        pytest.raises(
            ModelError, match=r"adapter in .* is not the model that was trained: its logits are off"
        ),
    ):
        simulate(folder, workers=1, engine="local", progress=progress)

    with RunFolder.resume(tmp_path / "run") as folder:
        assert folder.read_end() is None
        assert folder.latest() is not None
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    shutil.copytree(tmp_path / "copy", base, dirs_exist_ok=True)
    assert resumed(tmp_path / "run").summary.finished
