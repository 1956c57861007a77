"""What each client holds, trains and sends under a rule: slices of the global factors, and the way back.

The server holds factors of the run's rank r and scaling s. A client of rank r_i and scaling s_i gets the
first r_i ranks, B multiplied by s / s_i so that the product stays what it was, and its update is taken back
the same way. What it doesn't hold counts as zero in its adapter.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpeft.adapters.lora_names import factor_role
from fedpeft.aggregation.lora_rules.residual_names import is_residual
from fedpeft.aggregation.lora_rules.table import LORA_RULES, LoraRule, Role, rule_of
from fedpeft.config.sections import RunConfig
from fedpeft.updates.packed import Entry
from fedpeft.updates.update import Arrays, Layout, layout_of

_PEFT_DEFAULT = 8  # of r and of lora_alpha
_PLAIN = LORA_RULES["fedit"]  # who trains and sends what where no rule is named: everyone everything


@dataclass(frozen=True)
class Share:
    """One client's part.

    Attributes:
        rank: of its factors; None: the run's.
        ratio: s / s_i, the run's scaling over its own.
        trains: modules that it trains, by name or a part of it; empty: all.
    """

    rank: int | None = None
    ratio: float = 1.0
    trains: tuple[str, ...] = ()


def rank_of(run: RunConfig) -> int:
    """The adapter's r as the run file says it, or as `peft` has it; what is no rank is refused elsewhere."""
    rank = run.peft.options.get("r", _PEFT_DEFAULT)
    return rank if isinstance(rank, int) and rank > 0 else _PEFT_DEFAULT


def scaling_of(run: RunConfig) -> float:
    """lora_alpha / r, or over the root of r where ranks are stabilised."""
    rooted = run.peft.method == "rslora" or run.peft.options.get("use_rslora") is True
    given = run.peft.options.get("lora_alpha", _PEFT_DEFAULT)
    alpha = float(given) if isinstance(given, int | float) and given else float(_PEFT_DEFAULT)
    return alpha / math.sqrt(rank_of(run)) if rooted else alpha / rank_of(run)


class Shares:
    """The parts of a run's clients.

    Args:
        run: checked by `fedpeft.aggregation.lora_rules.lora_problems`.
    """

    def __init__(self, run: RunConfig) -> None:
        self._run = run
        self.rule: LoraRule = rule_of(run) or _PLAIN
        self._whole = Share()
        self._of_group = [_group_share(run, place) for place in range(len(run.groups))]

    @functools.cached_property
    def all_alike(self) -> bool:
        """Whether everybody holds, trains and sends everything, so that shares change nothing."""
        plain = self.rule.sent is _PLAIN.sent and self.rule.trained is _PLAIN.trained
        return plain and all(share == self._whole for share in self._of_group)

    def of(self, client: str) -> Share:
        """One client's part."""
        place = self._run.group_of(client)
        return self._whole if place is None else self._of_group[place]

    def is_trained(self, client: str, name: str, number: int) -> bool:
        """Whether a client trains a parameter in a round."""
        wanted = self.of(client).trains
        if wanted and not any(f".{part}." in f".{name}." for part in wanted):
            return False
        return self.rule.trained(_role(name), number)

    def is_sent(self, client: str, name: str, number: int) -> bool:
        """Whether a client sends a parameter's change in a round."""
        return self.is_trained(client, name, number) and self.rule.sent(_role(name), number)

    def is_private(self, name: str) -> bool:
        """Whether a parameter is nobody's but its client's."""
        return self.rule.keeps and not self.rule.sent(_role(name), 1)

    def rests(self, name: str, number: int) -> bool:
        """Whether nobody sends a parameter's change in a round."""
        role = _role(name)
        return not (self.rule.trained(role, number) and self.rule.sent(role, number))

    def view(self, client: str, state: Arrays) -> Arrays:
        """What a client is sent of a state, the state itself if that is all of it."""
        share = self.of(client)
        if share.rank is None and share.ratio == 1.0 and not self.rule.keeps:
            return state
        shown = {name: array for name, array in state.items() if not self.is_private(name)}
        return {name: _cut(name, array, share) for name, array in shown.items()}

    def layout(self, client: str, state: Layout, number: int) -> Layout:
        """What a client's update must look like, given the state's layout."""
        rank = self.of(client).rank
        return {
            name: _cut_entry(name, entry, rank)
            for name, entry in state.items()
            if not is_residual(name) and self.is_sent(client, name, number)
        }

    def widen(self, client: str, update: Arrays, state: Arrays) -> dict[str, NDArray[np.float32]]:
        """A client's update as a change of the whole state; what it didn't send doesn't change.

        Ranks that the client doesn't hold go to zero.
        """
        share = self.of(client)
        wide = {}
        for name, (shape, dtype) in layout_of(state).items():
            if is_residual(name):
                continue
            if name in update:
                wide[name] = _widen(name, update[name], state[name], share)
            else:
                wide[name] = np.zeros(shape, dtype=np.dtype(dtype))
        return wide


def _group_share(run: RunConfig, place: int) -> Share:
    group = run.groups[place]
    own = run.of_group(group)
    if rule_of(run) is None and not group.peft:
        return Share(trains=group.trains)
    rank = rank_of(own)
    return Share(None if rank == rank_of(run) else rank, scaling_of(run) / scaling_of(own), group.trains)


def _role(name: str) -> Role:
    role: Role = factor_role(name)[0]  # type: ignore[assignment]  # the two names that it knows
    return role


def _cut(name: str, array: NDArray[np.float32], share: Share) -> NDArray[np.float32]:
    role = _role(name)
    if role == "lora_A":
        return array[: share.rank]
    if role == "lora_B":
        return array[:, : share.rank] * np.float32(share.ratio)
    return array


def _cut_entry(name: str, entry: Entry, rank: int | None) -> Entry:
    role = _role(name)
    (shape, dtype) = entry
    if rank is None or role is None:
        return entry
    return ((rank, shape[1]) if role == "lora_A" else (shape[0], rank)), dtype


def _widen(
    name: str, change: NDArray[np.float32], state: NDArray[np.float32], share: Share
) -> NDArray[np.float32]:
    role = _role(name)
    if role is None or (share.rank is None and share.ratio == 1.0):
        return change
    wide = -state
    if role == "lora_A":
        wide[: share.rank] = change
    else:
        wide[:, : share.rank] = change / np.float32(share.ratio)
    return wide
