"""Telling a person or a program how a run goes: one protocol, three ways chosen by name.

`rich` draws live bars on a terminal and prints plain lines elsewhere, `quiet` prints the result alone, `json`
prints one row of `metrics.jsonl` a line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, Self, TextIO

from rich.console import Console

from fedpeft.errors import UsageError
from fedpeft.ledger.records import Baseline, ClientOutcome, Finished, Round, Row, Started
from fedpeft.reporting.live import LiveProgress
from fedpeft.reporting.plain import PlainProgress
from fedpeft.reporting.result import print_result
from fedpeft.reporting.summary import Summary

ProgressKind = Literal["rich", "quiet", "json"]


class Progress(Protocol):
    """What a run calls as it goes.

    Use it as a context manager, so that the terminal is put back however the run ends.
    None of the methods raises on account of a name that came from outside. All calls come from one thread.
    """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def setup(self, step: str) -> None:
        """A set-up step begins ("reading data"); the one before it is done."""

    def show_start(self, row: Started) -> None:
        """Set-up is done; this is the run."""

    def round_started(self, number: int, asked: int) -> None:
        """Round `number` begins with `asked` clients. The first call of a resumed run is not round 1."""

    def client_done(self, outcome: ClientOutcome) -> None:
        """One asked client of the current round is done, whatever became of it."""

    def round_done(self, row: Round) -> None:
        """The round is aggregated and evaluated; round 0 comes without `round_started`."""

    def baseline_progress(self, name: str, done: int, total: int) -> None:
        """A baseline has done `done` of `total` equal parts."""

    def baseline_done(self, row: Baseline) -> None:
        """A baseline is trained and evaluated."""

    def show_end(self, row: Finished) -> None:
        """The run has ended well."""

    def note(self, text: str) -> None:
        """Something a person should know, on one line."""

    def result(self, summary: Summary, paths: Mapping[str, Path], snippet: str) -> None:
        """The outcome, where its files lie (what it is -> path), and the code that loads the adapter."""


class _QuietProgress:
    """Prints the result and nothing else."""

    def __init__(self, out: TextIO) -> None:
        self._console = Console(file=out, highlight=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None: ...

    def setup(self, step: str) -> None: ...

    def show_start(self, row: Started) -> None: ...

    def round_started(self, number: int, asked: int) -> None: ...

    def client_done(self, outcome: ClientOutcome) -> None: ...

    def round_done(self, row: Round) -> None: ...

    def baseline_progress(self, name: str, done: int, total: int) -> None: ...

    def baseline_done(self, row: Baseline) -> None: ...

    def show_end(self, row: Finished) -> None: ...

    def note(self, text: str) -> None: ...

    def result(self, summary: Summary, paths: Mapping[str, Path], snippet: str) -> None:
        """Print table, paths and snippet."""
        print_result(self._console, summary, paths, snippet)


class _JsonProgress:
    """Prints each row as one JSON object a line, as `metrics.jsonl` holds it, and nothing else."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None: ...

    def setup(self, step: str) -> None: ...

    def show_start(self, row: Started) -> None:
        """Print the row."""
        self._print(row)

    def round_started(self, number: int, asked: int) -> None: ...

    def client_done(self, outcome: ClientOutcome) -> None: ...

    def round_done(self, row: Round) -> None:
        """Print the row."""
        self._print(row)

    def baseline_progress(self, name: str, done: int, total: int) -> None: ...

    def baseline_done(self, row: Baseline) -> None:
        """Print the row."""
        self._print(row)

    def show_end(self, row: Finished) -> None:
        """Print the row."""
        self._print(row)

    def note(self, text: str) -> None: ...

    def result(self, summary: Summary, paths: Mapping[str, Path], snippet: str) -> None: ...

    def _print(self, row: Row) -> None:
        self._out.write(row.model_dump_json() + "\n")
        self._out.flush()  # a reader of the pipe sees the row when it happens


def _for_people(out: TextIO) -> Progress:
    """Live bars need a terminal that can move its cursor; a file, a pipe or TERM=dumb gets plain lines."""
    console = Console(file=out, highlight=False)
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveProgress(console)
    return PlainProgress(console)


PROGRESS: dict[ProgressKind, Callable[[TextIO], Progress]] = {
    "rich": _for_people,
    "quiet": _QuietProgress,
    "json": _JsonProgress,
}


def make_progress(kind: str, out: TextIO | None = None) -> Progress:
    """The progress of that name, writing to `out` (default: standard output).

    Raises:
        UsageError: no progress has that name.
    """
    for name, make in PROGRESS.items():
        if name == kind:
            return make(sys.stdout if out is None else out)
    raise UsageError(f"no progress is called {kind!r}; use one of {', '.join(PROGRESS)}")
