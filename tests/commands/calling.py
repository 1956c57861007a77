"""Calling the command line in this process, and the overrides that make a run tiny."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from fedpeft.cli import main

TINY = (
    "run.rounds=1",
    "data.limit=32",
    "data.test_limit=8",
    "data.partitioner.clients=2",
    "training.steps=1",
    "training.batch_size=16",
    "peft.r=8",
    "evaluation.baselines=false",
)

Call = Callable[..., tuple[int, str, str]]


def overrides(*items: str) -> list[str]:
    """`--set` for each item."""
    return [part for item in items for part in ("--set", item)]


def exit_code(arguments: Sequence[str]) -> int:
    """What the command line ends with."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)
