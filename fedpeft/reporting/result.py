"""The end of a run in the terminal: the table, where things lie, and how to load the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.text import Text

from fedpeft.reporting.summary import Summary
from fedpeft.reporting.summary_table import summary_table
from fedpeft.reporting.text import printable
from fedpeft.reporting.verdict import verdict


def print_result(console: Console, summary: Summary, paths: Mapping[str, Path], snippet: str) -> None:
    """Print the outcome; paths and code are never broken over lines, so that they can be copied."""
    console.print()
    console.print(summary_table(summary))
    console.print(Text(verdict(summary)))
    if paths:
        console.print()
        width = max(len(name) for name in paths)
        for name, path in paths.items():
            console.print(Text(f"{name:<{width}}  {printable(str(path))}"), soft_wrap=True)
    if snippet:
        console.print()
        console.print(Text("Load it:"), style="bold")
        console.print(Text(snippet.rstrip("\n")), soft_wrap=True)
