"""The final table as a terminal shows it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fedpeft.ledger.records import Round, Row
from fedpeft.reporting.summary import build_summary
from fedpeft.reporting.summary_table import summary_table
from tests.reporting.rows import evaluation, started, whole_run


def shown(rows: list[Row], width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(summary_table(build_summary(rows)))
    return out.getvalue()


def line_of(table: str, label: str) -> list[str]:
    return next(line.split() for line in table.splitlines() if line.strip().startswith(label))


def test_it_fits_eighty_columns_without_cutting_anything() -> None:
    table = shown(whole_run())
    assert max(len(line) for line in table.splitlines()) <= 80
    assert "…" not in table


def test_it_holds_the_numbers() -> None:
    table = shown(whole_run())
    assert line_of(table, "pooled-data oracle")[2:] == ["95.1%", "92.5–97.7%", "0.498", "1.645"]
    assert line_of(table, "each client alone, mean")[4] == "20.9%"  # 0.16 + 0.014 * mean of 0..7
    assert line_of(table, "each client alone, worst")[4] == "16.0%"
    assert line_of(table, "bytes up per client")[4:6] == ["2.85", "MiB"]
    assert line_of(table, "wall time")[2:] == ["2", "min", "12", "s"]
    assert "exact match ↑" in table
    assert "loss ↓" in table


@pytest.mark.parametrize("rows", [[started()], [started(), Round(round=1)], whole_run()[:3]])
def test_it_stands_without_baselines_metrics_or_an_end(rows: list[Row]) -> None:
    assert "so far" in shown(rows)


@pytest.mark.parametrize(("name", "seen"), [("[red]a[/red]", "[red]a[/red]"), ("\x1b[31mb", "\ufffd[31mb")])
def test_a_name_is_neither_markup_nor_a_terminal_command(name: str, seen: str) -> None:
    table = shown([started(), Round(round=1, evaluation=evaluation(0.5, {name: 0.4}))])
    assert seen in table
    assert "\x1b" not in table
