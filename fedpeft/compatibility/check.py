"""From a run to the rows of the table that it breaks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedpeft.compatibility.conflict import Conflict
from fedpeft.compatibility.entries import Entry, entries_of, names_declaring, tables
from fedpeft.compatibility.table import CONFLICTS
from fedpeft.config.sections import RunConfig
from fedpeft.errors import Problem


def conflicts_of(run: RunConfig, rows: Sequence[Conflict] = CONFLICTS) -> list[Problem]:
    """Return one line per conflict of a run, in the order of the table; its groups are not looked into.

    Entries that there are not are left out: whoever reads their section says so.
    """
    entries = entries_of(run)
    words = {
        "strategy": run.federation.strategy.kind,
        "space": run.space.kind,
        "method": run.peft.method,
        "task": run.model.task,
        "lora_rule": str(run.federation.lora_rule),
    }
    declared = frozenset(trait for entry in entries for trait in entry.traits)
    return [
        Problem(f"{entry.key}{row.key}: {_fill(row, entry, other, words)}", row.code)
        for row in rows
        if declared.issuperset(row.has) and row.lacks not in declared
        for entry, other in _meetings(row, entries)
    ]


def _meetings(row: Conflict, entries: Sequence[Entry]) -> Iterator[tuple[Entry, Entry | None]]:
    """Entries for which a row holds, each with the one that it meets."""
    for entry in entries:
        if not entry.traits.issuperset(row.has):
            continue
        others = [each for each in entries if row.other in each.traits and each is not entry]
        if row.other is None or others:
            yield entry, others[0] if others else None


def _fill(row: Conflict, entry: Entry, other: Entry | None, words: dict[str, str]) -> str:
    fitting = [name for name, traits in tables(entry.table).items() if not traits.issuperset(row.has)]
    those = names_declaring(row.lacks) if row.lacks is not None else []
    return f"{row.reason}; {row.advice}".format(
        **words,
        name=entry.name,
        other=other.name if other is not None else "",
        why=entry.why,
        alternatives=", ".join(fitting),
        those=" or ".join(f"'{name}'" for name in those),
    )
