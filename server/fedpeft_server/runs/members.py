"""What people are told of a run's members: for whom a round waits, and whose answers have not counted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

MOST_NAMED = 5


@dataclass(frozen=True)
class MemberRounds:
    """In how many of the rounds that asked a member its answer counted."""

    name: str
    counted: int
    asked: int

    def __str__(self) -> str:
        return f"{self.name}: {self.counted} of {self.asked} rounds counted"


def incomplete(rows: Iterable[str]) -> list[MemberRounds]:
    """Members of whom a round's answer did not count, by name.

    Args:
        rows: records of rounds, as JSON. Those of runs whose cohort is secret name nobody.
    """
    asked: dict[str, int] = {}
    counted: dict[str, int] = {}
    for row in rows:
        for outcome in json.loads(row).get("outcomes", ()):
            name = outcome["client"]
            asked[name] = asked.get(name, 0) + 1
            counted[name] = counted.get(name, 0) + (outcome["status"] == "folded")
    return [
        MemberRounds(name, counted[name], asked[name])
        for name in sorted(asked)
        if counted[name] < asked[name]
    ]


def waits_for(away: Mapping[str, float], now: float) -> str:
    """Say for whom a round waits; empty for nobody.

    Args:
        away: for how many seconds each has been away.
        now: seconds since 1970.
    """
    named = sorted(away)[:MOST_NAMED]
    more = f"; and {len(away) - len(named)} more" if len(away) > len(named) else ""
    return (
        (f"waits for {'; '.join(_since(name, now - away[name], now) for name in named)}{more}")
        if away
        else ""
    )


def _since(name: str, at: float, now: float) -> str:
    then, today = datetime.fromtimestamp(at, UTC), datetime.fromtimestamp(now, UTC).date()
    return (
        f"{name}, away since {then:%H:%M} UTC"
        if then.date() == today
        else f"{name}, away since {then:%Y-%m-%d %H:%M} UTC"
    )
