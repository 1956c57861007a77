"""Every kind of progress through a whole run, and what each leaves in the terminal."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from rich.console import Console

from fedpeft.errors import UsageError
from fedpeft.ledger.records import Baseline, ClientOutcome, Round, Row, Started, parse_row
from fedpeft.reporting.live import LiveProgress
from fedpeft.reporting.progress import PROGRESS, Progress, make_progress
from fedpeft.reporting.summary import build_summary
from tests.reporting.rows import started, whole_run

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


def play(progress: Progress, rows: list[Row]) -> None:
    """What a run does with its progress."""
    with progress:
        progress.setup("reading data")
        progress.setup("loading the base model")
        for row in rows:
            play_row(progress, row)
    progress.result(build_summary(rows), {"adapter": Path("out/adapter")}, "model = load()\n")


def play_row(progress: Progress, row: Row) -> None:
    if isinstance(row, Started):
        progress.show_start(row)
    elif isinstance(row, Round):
        if row.round > 0:
            progress.round_started(row.round, len(row.outcomes))
            for outcome in row.outcomes:
                progress.client_done(outcome)
        progress.round_done(row)
    elif isinstance(row, Baseline):
        progress.baseline_progress(row.name, 1, 2)
        progress.baseline_done(row)
    else:
        progress.show_end(row)


def on_terminal() -> tuple[io.StringIO, LiveProgress]:
    out = io.StringIO()
    return out, LiveProgress(
        Console(file=out, force_terminal=True, width=100, highlight=False, legacy_windows=False)
    )


def test_the_table_of_kinds_is_complete() -> None:
    assert set(PROGRESS) == {"rich", "quiet", "json"}
    with pytest.raises(UsageError, match="'loud'; use one of rich, quiet, json"):
        make_progress("loud")


def test_json_prints_exactly_the_rows() -> None:
    out, rows = io.StringIO(), whole_run()
    play(make_progress("json", out), rows)
    assert [parse_row(line) for line in out.getvalue().splitlines()] == rows
    assert all(isinstance(json.loads(line), dict) for line in out.getvalue().splitlines())


def test_quiet_prints_the_result_alone() -> None:
    out = io.StringIO()
    play(make_progress("quiet", out), whole_run())
    assert "reading data" not in out.getvalue()
    assert "round  1" not in out.getvalue()
    assert "pooled-data oracle" in out.getvalue()
    assert "adapter  out/adapter\n" in out.getvalue()
    assert out.getvalue().endswith("model = load()\n")


def test_without_a_terminal_each_event_is_one_plain_line() -> None:
    out, rows = io.StringIO(), whole_run(rounds=3)
    play(make_progress("rich", out), rows)
    before, _, _ = out.getvalue().partition("\n\n")
    lines = before.splitlines()
    assert lines[:2] == ["reading data", "loading the base model"]
    assert lines[2].startswith(
        "demo: 8 clients, 1,240 training rows, 400 test rows; training 65,536 of 865,536"
    )
    assert [line[:9] for line in lines[3:7]] == ["before tr", "round 1/3", "round 2/3", "round 3/3"]
    assert [line.split("  ")[0] for line in lines[7:10]] == [
        "baseline zero-shot",
        "baseline local",
        "baseline pooled",
    ]
    assert lines[10:] == ["finished after 3 rounds in 2 min 12 s"]
    assert not ESCAPE.search(out.getvalue())
    assert "\r" not in out.getvalue()


def test_live_bars_vanish_and_leave_the_lines() -> None:
    out, progress = on_terminal()
    play(progress, whole_run(rounds=3))
    text = out.getvalue()
    assert text.count(HIDE) == text.count(SHOW) == 1
    assert "clients of round 2" in text
    after = ESCAPE.sub("", text[text.index(SHOW) :])
    assert "clients of round" not in after
    assert "pooled-data oracle" in after


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_the_cursor_comes_back_after_an_error(error: type[BaseException]) -> None:
    out, progress = on_terminal()
    streams = sys.stdout, sys.stderr

    def interrupted() -> None:
        with progress:
            progress.show_start(started())
            progress.round_started(1, 8)
            assert HIDE in out.getvalue()
            raise error

    with pytest.raises(error):
        interrupted()
    assert out.getvalue().rindex(SHOW) > out.getvalue().rindex(HIDE)
    assert (sys.stdout, sys.stderr) == streams


def test_a_resumed_run_does_not_take_its_first_rounds_for_speed() -> None:
    out, progress = on_terminal()
    with progress:
        progress.show_start(started(rounds=100))
        progress.round_started(91, 4)
        (rounds,) = [task for task in progress.tasks() if task.description == "rounds"]
        assert (rounds.completed, rounds.total, rounds.speed) == (90, 100, None)
        progress.client_done(ClientOutcome(client="a", status="folded"))
        assert rounds.completed == pytest.approx(90.2)  # four clients and the evaluation are five equal parts
    assert "90/100" in out.getvalue()


def test_the_time_that_is_left_counts_the_baselines() -> None:
    _, progress = on_terminal()
    with progress:
        progress.show_start(started(rounds=4, baselines=True))
        progress.round_started(4, 2)
        (bar,) = [task for task in progress.tasks() if "then baselines" in task.description]
        assert (bar.completed, bar.total) == (3, 12)
        progress.round_done(Round(round=4))
        assert bar.completed == 4
        progress.baseline_progress("zero-shot", 1, 1)
        assert bar.completed == 4
        progress.baseline_progress("local", 1, 2)
        assert bar.completed == 6
        progress.baseline_progress("pooled", 1, 4)
        assert bar.completed == 9


@pytest.mark.parametrize("kind", ["rich", "quiet", "json", "live"])
def test_hostile_names_and_reasons_do_no_harm(kind: str) -> None:
    name = "[/bold][red]\x1b]0;owned\x07"
    refused = ClientOutcome(client=name, status="refused", reason="[link=x]\x1b[2J")
    rows: list[Row] = [started(rounds=1, clients=[name]), Round(round=1, outcomes=(refused,), notes=(name,))]
    out, live = on_terminal()
    play(live if kind == "live" else make_progress(kind, out), rows)
    assert "\x1b]0" not in out.getvalue()
    assert "\x1b[2J\x1b[2J" not in out.getvalue()
    if kind in ("rich", "live"):
        assert "[/bold][red]\ufffd]0;owned\ufffd refused: [link=x]\ufffd[2J" in out.getvalue()


def test_a_forked_worker_gets_the_real_streams() -> None:
    """A worker that printed through the parent's live display could wait for a lock that nobody releases."""
    program = """
        import os, sys
        from rich.console import Console
        from fedpeft.reporting.live import LiveProgress
        real = sys.stdout
        with LiveProgress(Console(file=open(os.devnull, "w"), force_terminal=True)):
            if sys.stdout is real:
                sys.exit("the display did not take standard output over: nothing is tested")
            child = os.fork()
            if child == 0:
                os._exit(0 if sys.stdout is real else 7)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.exit(code)
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)]
    done = subprocess.run(command, timeout=60, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
