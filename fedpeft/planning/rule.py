"""How a run's updates will become one change, and who will attack that."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from fedpeft.attacks import attackers_of
from fedpeft.config.sections import RunConfig
from fedpeft.rounds.strategy_table import RULES, geometry_of


@dataclass(frozen=True)
class RulePlan:
    """The strategy, what it measures (empty: nothing), and a simulation's hostile clients."""

    strategy: str
    summary: str
    geometry: str
    attack: str
    attackers: tuple[str, ...]


def plan_rule(run: RunConfig, clients: Collection[str]) -> RulePlan | None:
    """None for a strategy that there is not.

    Raises:
        RunFileError: the attack is none, or names clients that the run hasn't.
    """
    section, attack = run.federation.strategy, run.federation.attack
    rule = RULES.get(section.kind)
    if rule is None:
        return None
    attackers = attackers_of(run, clients)
    return RulePlan(section.kind, rule.summary, geometry_of(run), attack.kind if attack else "", attackers)
