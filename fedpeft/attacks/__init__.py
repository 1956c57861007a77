"""Hostile clients for simulations: what they do to their rows, or to the update that they send."""

from fedpeft.attacks.base import Attack, AttackContext, attack_traits
from fedpeft.attacks.hostile import Hostile, hostile_clients
from fedpeft.attacks.table import (
    ATTACKS,
    attackers_of,
    build_attack,
    refuse_attack,
)

__all__ = [
    "ATTACKS",
    "Attack",
    "AttackContext",
    "Hostile",
    "attack_traits",
    "attackers_of",
    "build_attack",
    "hostile_clients",
    "refuse_attack",
]
