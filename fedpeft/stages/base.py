"""The seam: what a stage must say, and how stages are run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fedpeft.config.traits import NO_TRAITS, Trait, Traits, choose_traits
from fedpeft.runtime.randomness import stream
from fedpeft.updates.update import Arrays, Update
from fedpeft.wire.payloads import Payload

Role = Literal["weigh", "neutral", "bound", "noise", "lossy", "mask"]
"""What a stage does to an update's values, which decides what may stand before and after it."""


@dataclass(frozen=True)
class StageContext:
    """What a stage may know: the round, whose update it is, randomness, and a memory.

    Attributes:
        seed: the run's.
        round: from 1.
        client: the sender's name.
        memory: arrays a client keeps from round to round (error feedback); committed with the round.
        held_out_loss: mean loss of the round's state, moved by some arrays, on rows that the client keeps out
            of training; None where there are none. On the client only.
    """

    seed: int
    round: int
    client: str
    memory: MutableMapping[str, NDArray[Any]] = field(default_factory=dict)
    held_out_loss: Callable[[Arrays], float] | None = None

    def rng(self, stage: str) -> np.random.Generator:
        """This client's stream for this round: the same on client and server, so no source of privacy."""
        return stream(self.seed, "stages", stage, self.client, self.round)


class Stage(Protocol):
    """A pair of hooks. Both return a new update; neither changes its argument.

    Attributes:
        kind: name in the run file.
        role: see `fedpeft.stages.composition`.
        payload: the form in which values leave the client's hook; "dense" leaves them as they are.
    """

    kind: ClassVar[str]
    role: ClassVar[Role]
    payload: ClassVar[Payload]

    def model_dump(self, *, mode: Literal["json"], exclude_defaults: bool) -> dict[str, Any]:
        """The options by name, as plain JSON. All of them are public: they are in the run file."""
        ...

    def on_client(self, update: Update, context: StageContext) -> Update:
        """Run on the client before the update leaves."""
        ...

    def on_server(self, update: Update, context: StageContext) -> Update:
        """Undo the representation on the server, before the update is folded in.

        Raises:
            UpdateError: the update breaks what the client's hook promises.
        """
        ...


_OF_ROLE: Mapping[Role, Traits] = {
    "lossy": frozenset({Trait.LOSSY}),
    "mask": frozenset({Trait.ADDS_MASKS}),
}


def stage_traits(stage: Stage) -> Traits:
    """Return what a stage is: what its role says, its error feedback, and what else it declares.

    A stage declares more with an attribute `traits`, which need not be there.
    """
    fed_back = choose_traits({Trait.ERROR_FEEDBACK: bool(getattr(stage, "error_feedback", False))})
    declared: Traits = getattr(stage, "traits", NO_TRAITS)
    return _OF_ROLE.get(stage.role, NO_TRAITS) | fed_back | declared


def on_client(stages: Sequence[Stage], update: Update, context: StageContext) -> Update:
    """All client hooks, in the order of the run file."""
    for stage in stages:
        update = stage.on_client(update, context)
    return update


def on_server(stages: Sequence[Stage], update: Update, context: StageContext) -> Update:
    """All server hooks, in reverse order."""
    for stage in reversed(stages):
        update = stage.on_server(update, context)
    return update


def derive_payload(stages: Sequence[Stage]) -> Payload:
    """The form in which an update leaves the last client hook."""
    return next((stage.payload for stage in reversed(stages) if stage.payload != "dense"), "dense")


def stage_list(stages: Sequence[Stage]) -> tuple[tuple[str, str], ...]:
    """Each stage's kind and the options that differ from their defaults, as a header states them."""
    return tuple(
        (stage.kind, _compact(stage.model_dump(mode="json", exclude_defaults=True))) for stage in stages
    )


def _compact(options: dict[str, Any]) -> str:
    return json.dumps(options, sort_keys=True, separators=(",", ":"))
