"""The attacks by name, who makes them, and where there are none."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fedpeft.attacks.base import Attack
from fedpeft.attacks.colluding import InnerProduct, LittleIsEnough
from fedpeft.attacks.factor_rotation import FactorRotation
from fedpeft.attacks.own import LabelFlip, NoiseAttack, Scaled, SignFlip
from fedpeft.config.option_tables import build_option
from fedpeft.config.sections import RunConfig
from fedpeft.errors import RunFileError
from fedpeft.plugins import EntryTable, offers
from fedpeft.runtime.randomness import stream

_OWN: dict[str, Any] = {  # a class that is an Attack and takes its options by name
    "alie": LittleIsEnough,
    "gauge": FactorRotation,
    "inner-product": InnerProduct,
    "label-flip": LabelFlip,
    "noise": NoiseAttack,
    "scaled": Scaled,
    "sign-flip": SignFlip,
}

ATTACKS: EntryTable[Any] = EntryTable("attacks", _OWN, offers("kind", "colludes", "on_labels", "on_update"))


def build_attack(run: RunConfig) -> Attack | None:
    """What the run's hostile clients do; None where there are none.

    Raises:
        RunFileError: an unknown kind or option.
    """
    section = run.federation.attack
    if section is None:
        return None
    attack: Attack = build_option("federation.attack", ATTACKS, section.kind, section.options)
    return attack


def attackers_of(run: RunConfig, names: Collection[str]) -> tuple[str, ...]:
    """The run's hostile clients, sorted: those that it names, or a share drawn from the run's seed.

    Raises:
        RunFileError: as `build_attack`; it names one that is not among `names`; two must collude and there is
            one.
    """
    section, attack = run.federation.attack, build_attack(run)
    if section is None or attack is None:
        return ()
    unknown = sorted(set(section.clients) - set(names))
    if unknown:
        raise RunFileError(
            "run file",
            [f"federation.attack.clients: the run has no client {unknown[0]!r}; name its own {len(names)}"],
        )
    chosen = tuple(sorted(set(section.clients)))
    if section.fraction is not None:
        count = max(1, round(section.fraction * len(names)))
        rng = stream(run.run.seed, "attackers")
        chosen = tuple(sorted(rng.choice(sorted(names), size=count, replace=False).tolist()))
    if attack.colludes and len(chosen) < 2:
        raise RunFileError(
            "run file",
            [f"federation.attack: {section.kind} takes at least 2 clients that collude, and there is 1"],
        )
    return chosen


def refuse_attack(run: RunConfig) -> None:
    """Let no run pass that has hostile clients of its own; what every deployed server and client calls first.

    Raises:
        RunFileError: `federation.attack` is there.
    """
    if run.federation.attack is not None:
        raise RunFileError(
            "run file",
            [
                "federation.attack: clients are made hostile in simulations only, and this run is none;"
                " remove [federation.attack]"
            ],
        )
