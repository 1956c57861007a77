"""Settings that fit, in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedpeft.planning.fit import Proposal
from fedpeft.reporting.text import byte_size, printable


def show_fit(console: Console, run: str, limit: int, found: Sequence[Proposal]) -> None:
    """Print the proposals as a table, then the settings of the last one to paste."""
    title = Text(f"{printable(run)} · what fits in {byte_size(limit)}, predicted from shapes", style="bold")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("proposal", no_wrap=True)
    for heading in ("memory", "base", "training"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    table.add_column("what it costs", style="dim")
    for proposal in found:
        memory = proposal.memory
        table.add_row(
            Text(proposal.tier),
            byte_size(proposal.total),
            byte_size(memory.base),
            byte_size(memory.peak - memory.base),
            "yes" if proposal.fits else "no",
            Text("; ".join(proposal.costs)),
        )
    console.print(table)
    best = found[-1]
    if not best.fits:
        console.print("nothing fits: choose a smaller model, shorter rows (data.max_length), or more memory")
        return
    if not best.settings:
        console.print(Text("the run file fits as it is"))
        return
    console.print(Text("to run so, add:"))
    flags = " ".join(f"--set '{printable(item)}'" for item in best.settings)
    console.print(Text(f"  {flags}"), soft_wrap=True)
