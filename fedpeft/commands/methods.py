"""`fedpeft methods`."""

from __future__ import annotations

import json
import sys

from rich.console import Console
from rich.text import Text

from fedpeft.commands.catalogue import CatalogueEntry, catalogue


def methods_command(*, as_json: bool) -> None:
    """Print everything that a run file can name, one line each."""
    sections = catalogue()
    if as_json:
        print(
            json.dumps(
                {section: [_plain(entry) for entry in entries] for section, entries in sections.items()}
            )
        )
        return
    console = Console(file=sys.stdout, highlight=False)
    for number, (section, entries) in enumerate(sections.items()):
        if number:
            console.print()
        console.print(Text(section, style="bold"))
        width = max(len(entry.name) for entry in entries)
        for entry in entries:
            flags = f" [{', '.join(entry.flags)}]" if entry.flags else ""
            console.print(
                Text(f"  {entry.name:<{width}}  {entry.summary}").append(flags, style="dim"), soft_wrap=True
            )


def _plain(entry: CatalogueEntry) -> dict[str, object]:
    return {"name": entry.name, "summary": entry.summary, "flags": list(entry.flags)}
