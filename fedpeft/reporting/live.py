"""Progress as live bars at the foot of a terminal, with finished rounds scrolling above them."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.file_proxy import FileProxy
from rich.progress import (
    BarColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

from fedpeft.ledger.records import Baseline, ClientOutcome, Finished, Round, Started
from fedpeft.reporting import event_lines
from fedpeft.reporting.result import print_result
from fedpeft.reporting.summary import Summary
from fedpeft.reporting.text import printable

_LIKE_ALL_ROUNDS = ("local", "pooled")  # baselines with a budget, in their order
_ETA_WINDOW_S = 24 * 3600.0  # rich forgets samples older than this; a round may take long


class LiveProgress:
    """Bars for rounds, the round's clients and baselines, a spinner for set-up; the bars vanish at the end.

    The bar of rounds also moves with each client, so that the first estimate of the remaining time comes
    within the first round. Evaluation counts as much as one client in it. Where baselines follow, the bar is
    of the whole run: clients alone, and the pooled model, each take about as much training as all rounds.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[count]}", markup=False, justify="right"),
            TimeElapsedColumn(),
            TextColumn("left", style="dim"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            transient=True,
            expand=True,
            speed_estimate_period=_ETA_WINDOW_S,
        )
        self._tasks: dict[str, TaskID] = {}
        self._primary = ""
        self._rounds = 0
        self._work = 0.0  # of the whole run, in rounds
        self._current = 0
        self._asked = 0
        self._answered = 0

    def __enter__(self) -> Self:
        _restore_streams_in_children()
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Take the bars away and show the cursor again, also after an error or Ctrl-C."""
        self._bars.stop()

    def setup(self, step: str) -> None:
        """Show the step with a spinner."""
        self._end("setup")
        self._tasks["setup"] = self._bars.add_task(printable(step), total=None, count="")

    def show_start(self, row: Started) -> None:
        """Print what the run is."""
        self._end("setup")
        self._primary, self._rounds = row.primary_metric, row.rounds
        self._work = row.rounds * (1 + len(_LIKE_ALL_ROUNDS) * row.baselines)
        self._print(event_lines.format_start(row))

    def round_started(self, number: int, asked: int) -> None:
        """Move the bar of rounds and begin one for the round's clients."""
        self._end("setup")
        self._current, self._asked, self._answered = number, asked, 0
        self._advance_rounds(number - 1)
        self._end("clients")
        if asked:  # none are told of where the cohort is secret
            self._advance("clients", f"clients of round {number}", 0, asked, f"0/{asked}")

    def client_done(self, outcome: ClientOutcome) -> None:
        """Move the bars; print a failure with its reason."""
        self._answered += 1
        done, asked = self._answered, max(self._asked, self._answered)
        within = self._current - 1 + done / (asked + 1)
        if self._asked:
            self._advance("clients", f"clients of round {self._current}", done, asked, f"{done}/{asked}")
            self._advance_rounds(within)
        line = event_lines.trouble_line(outcome)
        if line is not None:
            self._print(line, style="yellow")

    def round_done(self, row: Round) -> None:
        """Print the round and its notes above the bars."""
        self._end("clients")
        if row.round >= self._work:
            self._end("rounds")
        elif row.round > 0:
            self._advance_rounds(row.round)
        self._print(event_lines.round_line(row, self._rounds, self._primary))
        for note in row.notes:
            self.note(note)

    def baseline_progress(self, name: str, done: int, total: int) -> None:
        """Move the baseline's bar."""
        self._end("setup")
        self._advance(f"baseline {name}", f"baseline {name}", done, total, f"{done}/{total}")
        if name in _LIKE_ALL_ROUNDS and self._work > self._rounds:
            self._advance_rounds(self._rounds * (1 + _LIKE_ALL_ROUNDS.index(name) + done / max(1, total)))

    def baseline_done(self, row: Baseline) -> None:
        """Take its bar away and print its value."""
        self._end(f"baseline {row.name}")
        self._print(event_lines.baseline_line(row, self._primary))

    def show_end(self, row: Finished) -> None:
        """Take all bars away."""
        for name in list(self._tasks):
            self._end(name)
        self._print(event_lines.format_end(row))

    def note(self, text: str) -> None:
        """Print the note above the bars."""
        self._print(f"note: {printable(text)}", style="yellow")

    def result(self, summary: Summary, paths: Mapping[str, Path], snippet: str) -> None:
        """Print table, paths and snippet."""
        print_result(self._console, summary, paths, snippet)

    def tasks(self) -> list[Task]:
        """The bars that are shown now."""
        return list(self._bars.tasks)

    def _advance_rounds(self, done: float) -> None:
        """Move the bar of rounds, or of the whole run where baselines follow."""
        text = "rounds" if self._work == self._rounds else "rounds, then baselines"
        self._advance("rounds", text, done, self._work, f"{min(int(done), self._rounds)}/{self._rounds}")

    def _advance(self, name: str, text: str, done: float, total: float, count: str) -> None:
        """Move a bar, making it where it starts: a jump to the first position must not count as speed."""
        if name in self._tasks:
            self._bars.update(
                self._tasks[name], completed=done, total=total, count=count, description=printable(text)
            )
        else:
            self._tasks[name] = self._bars.add_task(
                printable(text), completed=int(done), total=total, count=count
            )

    def _end(self, name: str) -> None:
        task = self._tasks.pop(name, None)
        if task is not None:
            self._bars.remove_task(task)

    def _print(self, line: str, style: str | None = None) -> None:
        self._console.print(Text(line), style=style)


@functools.cache
def _restore_streams_in_children() -> None:
    """Give forked worker processes the real standard streams (registered once per process).

    While bars are live, `sys.stdout` and `sys.stderr` are proxies that take the console's lock. A child
    forked while the drawing thread holds it would wait for ever at its first print.
    """
    os.register_at_fork(after_in_child=_unwrap_streams)


def _unwrap_streams() -> None:
    if isinstance(sys.stdout, FileProxy):
        sys.stdout = sys.stdout.rich_proxied_file
    if isinstance(sys.stderr, FileProxy):
        sys.stderr = sys.stderr.rich_proxied_file
