"""The hostile clients of one loaded run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from fedpeft.attacks.base import Attack, AttackContext
from fedpeft.attacks.table import attackers_of, build_attack
from fedpeft.config.sections import RunConfig
from fedpeft.data.encoded import Encoded
from fedpeft.data.tables import ClientRows
from fedpeft.runtime.randomness import stream
from fedpeft.updates.update import Arrays, Update, arrays_digest

Report = TypeVar("Report")
Training = Callable[[str], tuple[Update, Report]]
"""One client's honest part of a round, by name."""


@dataclass
class Hostile:
    """Who they are and what they do.

    Attributes:
        clients: how many the run has.
        rows: the run's rows as the attackers train on them.
    """

    attack: Attack
    names: tuple[str, ...]
    seed: int
    clients: int
    rows: Encoded
    _known: tuple[object, Sequence[Update]] = field(default=(None, ()), repr=False)  # a cache of one round

    def send(self, name: str, round_: int, state: Arrays, train: Training[Report]) -> tuple[Update, Report]:
        """What one of them sends, and the report of its honest training.

        Nothing of it depends on which of them were asked before, or on the process.
        """
        update, report = train(name)

        def honest() -> Sequence[Update]:
            key = (round_, arrays_digest(state))
            if self._known[0] != key:
                all_ = [update if other == name else train(other)[0] for other in self.names]
                self._known = (key, all_)
            return self._known[1]

        rng = stream(self.seed, "attack", name, round_)
        context = AttackContext(rng, state, self.clients, len(self.names), honest)
        return self.attack.on_update(update, context), report


def hostile_clients(
    run: RunConfig, clients: Sequence[ClientRows], rows: Encoded, classes: int | None
) -> Hostile | None:
    """The hostile clients of a run whose rows are read; None if it has none.

    Args:
        classes: of a classifier.

    Raises:
        RunFileError: the run names others than its clients, or an attack that it can't have.
    """
    attack = build_attack(run)
    if attack is None:
        return None
    by_name = {client.name: client for client in clients}
    names = attackers_of(run, by_name.keys())
    return Hostile(
        attack, names, run.run.seed, len(clients), _flip_labels(attack, names, by_name, rows, classes)
    )


def _flip_labels(
    attack: Attack,
    names: Sequence[str],
    clients: Mapping[str, ClientRows],
    rows: Encoded,
    classes: int | None,
) -> Encoded:
    """Only their training rows: what they hold out scores the model, which must stay honest."""
    if rows.labels is None or classes is None:
        return rows
    labels = rows.labels.copy()
    own = np.concatenate([clients[name].train for name in names])
    labels[own] = attack.on_labels(labels[own], classes)
    return replace(rows, labels=labels)
