"""A whole simulated run with compressed updates: what it saves, and that it can be stopped and repeated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedpeft.config.run_file import build_run, run_digest
from fedpeft.errors import UpdateError
from fedpeft.ledger.checkpoint import read_checkpoint
from fedpeft.ledger.records import Finished, Round, parse_row
from tests.simulation.conftest import tiny_tables
from tests.simulation.runs import fingerprint, resumed, simulated


@pytest.fixture(scope="module")
def tables() -> dict[str, Any]:
    stage = {"kind": "ternary", "density": 0.1, "error_feedback": True}
    tables = tiny_tables() | {"stages": [{"kind": "clip", "clip_norm": 10.0}, stage]}
    return tables | {"peft": {"method": "lora", "r": 8, "lora_dropout": 0.1}}


@pytest.fixture(scope="module")
def whole(tables: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compressed") / "whole"
    simulated(tables, out)
    return out


def rounds(out: Path) -> list[Round]:
    rows = [parse_row(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if isinstance(row, Round) and row.round]


def test_updates_are_fifteen_times_smaller_than_bf16(whole: Path) -> None:
    started = json.loads((whole / "metrics.jsonl").read_text().splitlines()[0])
    for row in rounds(whole):
        assert len(row.outcomes) == 4
        for outcome in row.outcomes:
            assert 15 * outcome.bytes_up < 2 * started["trainable_parameters"]
    last = parse_row((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert isinstance(last, Finished)
    assert 15 * last.bytes_up_per_client < 3 * 2 * started["trainable_parameters"]


def test_what_compression_loses_is_recorded(whole: Path) -> None:
    for row in rounds(whole):
        for outcome in row.outcomes:
            assert outcome.distortion is not None
            assert outcome.cosine is not None
            assert 0.1 < outcome.distortion < 1  # the least-squares scale never overshoots
            # the error of a projection: what is kept and what is lost are orthogonal
            assert outcome.distortion**2 + outcome.cosine**2 == pytest.approx(1, abs=0.02)


def test_residuals_are_in_the_checkpoint_and_serve_a_resumed_run(
    whole: Path, tables: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "torn"
    simulated(tables, out, workers=2)
    assert fingerprint(out) == fingerprint(whole)
    last = out / "checkpoints" / "round-000003.safetensors"
    digest = run_digest(build_run(tables, source="test"))
    before = read_checkpoint(out / "checkpoints" / "round-000002.safetensors", digest)
    assert {key.split("/")[1] for key in before.clients} == {"residual"}
    assert len(before.clients) == 4 * len(before.state)
    assert any(array.any() for array in before.clients.values())
    last.unlink()
    (out / "report.html").unlink()
    resumed(out, workers=2)
    assert fingerprint(out) == fingerprint(whole)


def test_the_report_says_what_was_lost_and_saved(whole: Path) -> None:
    text = (whole / "report.html").read_text()
    assert "lost on the way" in text
    assert ">154 KiB</td>" in text  # 78,848 parameters of two bytes


def test_every_round_says_what_each_stage_made_of_an_update(whole: Path) -> None:
    for row in rounds(whole):
        assert row.up is not None
        assert row.down is not None
        assert [name for name, _ in row.up.stages] == ["plain", "weigh", "clip", "ternary"]
        sizes = [size for _, size in row.up.stages]
        assert sizes[:3] == [4 * 78_848] * 3
        counted = [outcome.bytes_up for outcome in row.outcomes]
        assert row.up.message == pytest.approx(sum(counted) / len(counted))
        assert 0 < row.up.message - sizes[3] < 500  # the header
        lost = [outcome.cosine for outcome in row.outcomes if outcome.cosine is not None]
        assert row.up.cosine == pytest.approx(sum(lost) / 4)
        assert row.down.stages == (("plain", 4 * 78_848),)
        assert row.down.cosine is None
    summary = json.loads((whole / "summary.json").read_text())["transfers"]["up"]
    assert (summary["fp32"], summary["bf16"]) == (4 * 78_848, 2 * 78_848)
    assert summary["message"] == pytest.approx(
        sum(row.up.message for row in rounds(whole) if row.up) / len(rounds(whole))
    )


@pytest.mark.parametrize("key", ["stages", "downlink"])
def test_a_run_whose_compressor_touches_nothing_ends_with_an_error(
    key: str, tables: dict[str, Any], tmp_path: Path
) -> None:
    """Names that no tensor has, as a filter for another kind of model has them."""
    stage = {"kind": "quantise", "tensors": ["*.q_proj.weight"]}
    told = {"stages": [], "downlink": stage} if key == "downlink" else {"stages": [stage]}
    with pytest.raises(UpdateError, match="the compressor matches none of"):
        simulated({**tables, **told}, tmp_path / "run")
