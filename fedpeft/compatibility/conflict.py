"""One row of the table of conflicts."""

from __future__ import annotations

from dataclasses import dataclass

from fedpeft.config.traits import Trait


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """Two things that can't be in one run, with the reason and what to do.

    The row holds for each entry that declares all of `has`, where other entries of the run declare `other`,
    or where none declares `lacks`. The line is ``KEY: REASON; ADVICE`` with the key of that entry. Reason and
    advice may say {name} (of that entry), {other} (of the one that it meets), {why} (what the entry adds of
    itself), {alternatives} (names of its table that don't declare `has`), {those} (names that declare
    `lacks`), and {strategy}, {space}, {method}, {task} and {lora_rule} of the run.

    Attributes:
        code: stable; what tests and programs match.
        key: what is appended to the entry's key, such as ".geometry".
    """

    code: str
    has: tuple[Trait, ...]
    other: Trait | None = None
    lacks: Trait | None = None
    key: str = ""
    reason: str
    advice: str
