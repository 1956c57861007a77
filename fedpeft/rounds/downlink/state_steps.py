"""The public course of the global state: each round's step as bytes, made by the server and taken by clients.

With a downlink stage the state moves by what clients can decode and by nothing else:
``state + decode(encode(change + memory))``, where the memory is the server's own error feedback. So whoever
takes the same steps from the same start holds the same bits, in whatever rounds it took part.

Source: Tang, Yu, Lian, Zhang and Liu 2019, DoubleSqueeze, algorithm 1 (the server's side): error feedback on
the way down. We compress the change of the state and not the mean gradient, after the server's strategy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import UpdateError
from fedpeft.spaces import ServerSpace
from fedpeft.stages import Stage, StageContext, derive_payload, on_client, on_server, stage_list
from fedpeft.updates.update import Arrays, Update, arrays_digest, layout_of
from fedpeft.wire.codec import Envelope, decode, encode

SERVER = "(server)"  # the sender's name in the stage's streams
Memory = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Step:
    """One round's step.

    Attributes:
        state: the state after it.
        payload: the step as bytes; its header names the fingerprint of `state`. Empty where none is sent.
        memory: what the server keeps for the next step.
        distortion: relative L2 of what was sent against what was to be sent; None where nothing is lost.
        cosine: between the same two.
    """

    state: Arrays
    payload: bytes = b""
    memory: Memory = field(default_factory=dict)
    distortion: float | None = None
    cosine: float | None = None


class Steps(Protocol):
    """How a run's states follow each other: the server makes steps, clients take them."""

    def make(self, number: int, state: Arrays, change: Mapping[str, NDArray[Any]], memory: Memory) -> Step:
        """The step of round `number` from `state` by an aggregated change (float64)."""
        ...

    def take(self, state: Arrays, payload: bytes, *, who: str) -> tuple[Arrays, str]:
        """The state after a step, and the fingerprint that the step's header announces for it.

        Raises:
            UpdateError: the step is damaged, of another run, or doesn't fit the state.
        """
        ...


@dataclass(frozen=True)
class CompressedSteps:
    """Steps through one lossy stage.

    Attributes:
        seed: the run's.
        stage: from `fedpeft.stages.build_downlink`.
    """

    run_digest: str
    seed: int
    space: ServerSpace
    stage: Stage

    def make(self, number: int, state: Arrays, change: Mapping[str, NDArray[Any]], memory: Memory) -> Step:
        """Compress the change and what is left of earlier ones; move by what clients will decode."""
        context = StageContext(self.seed, number, SERVER, dict(memory))
        plain = Update({name: array.astype(np.float32) for name, array in change.items()})
        sent = on_client((self.stage,), plain, context)
        after = self._apply_step(state, on_server((self.stage,), sent, context))
        envelope = Envelope(
            arrays={},
            run_digest=self.run_digest,
            round=number,
            state_digest=arrays_digest(after),
            space=self.space.kind,
            encoded=sent.encoded,
            stages=stage_list((self.stage,)),
        )
        metrics = sent.metrics
        return Step(
            after, encode(envelope), dict(context.memory), metrics.get("distortion"), metrics.get("cosine")
        )

    def take(self, state: Arrays, payload: bytes, *, who: str) -> tuple[Arrays, str]:
        """Undo the stage and move."""
        layout = self.space.update_layout(layout_of(state))
        envelope = decode(payload, who=who, layout=layout, expect=derive_payload((self.stage,)))
        came = (envelope.run_digest, envelope.space, envelope.stages)
        if came != (self.run_digest, self.space.kind, stage_list((self.stage,))):
            raise UpdateError(f"{who}: a step of another run or downlink stage came; restart both sides")
        context = StageContext(self.seed, envelope.round, SERVER)
        update = on_server((self.stage,), Update({}, encoded=envelope.encoded), context)
        return self._apply_step(state, update), envelope.state_digest

    def _apply_step(self, state: Arrays, step: Update) -> Arrays:
        wide = {name: array.astype(np.float64) for name, array in step.arrays.items()}
        return self.space.apply(state, wide)
