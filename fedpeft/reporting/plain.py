"""Progress as plain lines, for logs and pipes: no cursor movement, nothing that is rewritten."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.text import Text

from fedpeft.ledger.records import Baseline, ClientOutcome, Finished, Round, Started
from fedpeft.reporting import event_lines
from fedpeft.reporting.result import print_result
from fedpeft.reporting.summary import Summary
from fedpeft.reporting.text import printable


class PlainProgress:
    """Prints one line per finished step; single clients only if they fail."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._primary = ""
        self._rounds = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None: ...

    def setup(self, step: str) -> None:
        """Print the step."""
        self._print(printable(step))

    def show_start(self, row: Started) -> None:
        """Print what the run is."""
        self._primary, self._rounds = row.primary_metric, row.rounds
        self._print(event_lines.format_start(row))

    def round_started(self, number: int, asked: int) -> None:
        """Nothing: the round is printed when it is done."""

    def client_done(self, outcome: ClientOutcome) -> None:
        """Print a failure with its reason."""
        line = event_lines.trouble_line(outcome)
        if line is not None:
            self._print(line)

    def round_done(self, row: Round) -> None:
        """Print the round and its notes."""
        self._print(event_lines.round_line(row, self._rounds, self._primary))
        for note in row.notes:
            self.note(note)

    def baseline_progress(self, name: str, done: int, total: int) -> None:
        """Nothing: the baseline is printed when it is done."""

    def baseline_done(self, row: Baseline) -> None:
        """Print the baseline's value."""
        self._print(event_lines.baseline_line(row, self._primary))

    def show_end(self, row: Finished) -> None:
        """Print how long it took."""
        self._print(event_lines.format_end(row))

    def note(self, text: str) -> None:
        """Print the note."""
        self._print(f"note: {printable(text)}")

    def result(self, summary: Summary, paths: Mapping[str, Path], snippet: str) -> None:
        """Print table, paths and snippet."""
        print_result(self._console, summary, paths, snippet)

    def _print(self, line: str) -> None:
        """One event, one line, however long; `Text` is never read as markup."""
        self._console.print(Text(line), soft_wrap=True)
        self._console.file.flush()
