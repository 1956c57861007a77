"""What a transfer weighs, after each stage and next to dense ones, wherever the report says it."""

from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console

from fedpeft.ledger.records import Round, Row, TrafficStats
from fedpeft.reporting.html import render_report
from fedpeft.reporting.sinks import scalars
from fedpeft.reporting.summary import build_summary, summary_json
from fedpeft.reporting.summary_table import summary_table
from tests.reporting.rows import started, whole_run

ENTRIES = 65_536


def leg(kind: str, coded: float, message: float, lost: tuple[float, float] | None) -> TrafficStats:
    return TrafficStats(
        stages=(("plain", 4.0 * ENTRIES), ("weigh", 4.0 * ENTRIES), (kind, coded)),
        message=message,
        distortion=lost[0] if lost else None,
        cosine=lost[1] if lost else None,
    )


def compressed_run() -> list[Row]:
    """Round r sends 4,000 + 100 r bytes up, of which 200 are header, with cosine 0.7 + r / 100."""
    rows: list[Row] = []
    for row in whole_run(rounds=4):
        if isinstance(row, Round) and row.round:
            size, cosine = 4000.0 + 100 * row.round, 0.7 + row.round / 100
            up = leg("ternary", size - 200, size, (0.6, cosine))
            row = row.model_copy(update={"up": up, "down": leg("quantise", 66_000.0, 262_144.0, None)})
        rows.append(row)
    return rows


def test_the_summary_holds_means_over_the_rounds() -> None:
    told = json.loads(json.dumps(summary_json(build_summary(compressed_run()))))["transfers"]
    assert told["up"] == {
        "direction": "up",
        "stages": [["plain", 262_144.0], ["weigh", 262_144.0], ["ternary", 4050.0]],
        "message": 4250.0,
        "fp32": 262_144.0,
        "bf16": 131_072.0,
        "distortion": 0.6,
        "cosine": pytest.approx(0.725),
    }
    assert (told["down"]["message"], told["down"]["cosine"]) == (262_144.0, None)


def test_a_run_without_legs_has_no_transfers() -> None:
    summary = build_summary(whole_run())
    assert summary.journeys == ()
    assert summary_json(summary)["transfers"] == {}
    assert "What a transfer weighs" not in render_report("", whole_run())


def test_the_table_compares_what_was_lossy_with_bf16() -> None:
    out = io.StringIO()
    Console(file=out, width=80).print(summary_table(build_summary(compressed_run())))
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert ["up,", "against", "bf16", "30.8x", "less", "cosine", "0.725"] in lines  # 131,072 / 4,250
    assert not any(line[:2] == ["down,", "against"] for line in lines)


def test_the_report_shows_every_stage_and_every_rounds_distortion() -> None:
    page = render_report("", compressed_run())
    part = page[page.index("What a transfer weighs</summary>") :]
    part = part[: part.index("</table>")]
    cells = [re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<t[dh][^>]*>.*?</t[dh]>", part)]
    for stage, size, share in (
        ("plain", "256 KiB", "200.0%"),
        ("ternary", "3.96 KiB", "3.1%"),
        ("message", "4.15 KiB", "3.2%"),
        ("quantise", "64.5 KiB", "50.4%"),
        ("bf16, all trained parameters", "128 KiB", "100.0%"),
    ):
        place = cells.index(stage)
        assert cells[place + 1 : place + 3] == [size, share]
    assert "relative L2 0.600, cosine 0.725" in cells
    rounds = page[page.index("<summary>Every round</summary>") :]
    rounds = rounds[: rounds.index("</table>")]
    assert "cosine up" in rounds
    assert "cosine down" not in rounds
    assert [f"{0.7 + number / 100:.3f}" in rounds for number in (1, 2, 3, 4)] == [True] * 4


def test_rows_with_legs_come_back_as_they_were() -> None:
    for row in compressed_run():
        if isinstance(row, Round):
            assert Round.model_validate_json(row.model_dump_json()) == row
    assert started().trainable_parameters == ENTRIES


def test_sinks_get_every_rounds_distortion() -> None:
    row = next(row for row in compressed_run() if isinstance(row, Round) and row.round == 2)
    told = {name: value for name, value, _ in scalars(row, started(), 4)}
    assert told["distortion/up"] == 0.6
    assert told["cosine/up"] == pytest.approx(0.72)
    assert not {"distortion/down", "cosine/down"} & told.keys()
