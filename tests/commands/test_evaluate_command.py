"""`fedpeft evaluate` gives a run's own last numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.commands.calling import Call


def test_evaluate_repeats_the_last_round_exactly(
    call: Call, tiny_run: Path, tiny_rows: list[dict[str, Any]]
) -> None:
    last = [row for row in tiny_rows if row["event"] == "round"][-1]["evaluation"]
    finished = tiny_rows[-1]
    for folder in (tiny_run, tiny_run / "adapter"):
        code, out, _ = call("evaluate", str(folder), "--json")
        assert code == 0
        row = json.loads(out)
        assert row["scores"] == last["scores"]
        assert row["clients"] == last["clients"]
        assert row["adapter_digest"] == finished["adapter_digest"]


def test_evaluate_tells_trained_from_untrained(tiny_rows: list[dict[str, Any]]) -> None:
    """Otherwise the test above could not tell an adapter that was never put on."""
    rounds = [row for row in tiny_rows if row["event"] == "round"]
    before, after = (row["evaluation"]["scores"]["loss"]["value"] for row in rounds)
    assert before != after


def test_evaluate_for_people(call: Call, tiny_run: Path) -> None:
    code, out, _ = call("evaluate", str(tiny_run))
    assert code == 0
    for piece in ("8 test rows", "exact match", "95% interval", "worst client"):
        assert piece in out


def test_evaluate_refuses_what_is_no_adapter(call: Call, tiny_run: Path, tmp_path: Path) -> None:
    run = str(tiny_run / "run.toml")
    for folder, code in ((tmp_path / "absent", 2), (tmp_path, 2)):
        assert call("evaluate", str(folder))[0] == code
    code, out, err = call("evaluate", str(tmp_path), "--run", run)
    assert (code, out) == (5, "")
    assert err.count("\n") == 1
    assert "adapter_config.json" in err


def test_evaluate_needs_rows_to_score(call: Call, tmp_path: Path, tiny_run: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a tale"}\n{"text": "a second tale"}\n')
    items = (
        f"data.train={tmp_path / 'rows.jsonl'}",
        "data.text={text}",
        "data.heldout=0.0",
        "evaluation.metrics=[]",
        "data.test_limit=1",
    )
    arguments = [part for item in items for part in ("--set", item)]
    code, _, err = call("evaluate", str(tiny_run), *arguments)
    assert code == 4
    assert "no test rows" in err
