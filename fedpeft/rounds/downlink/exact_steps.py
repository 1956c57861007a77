"""Steps in an exact seed space: what changed in the integers, entropy-coded.

Nothing is lost on the way: the state is the same as if it had travelled whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from fedpeft.config.sections import RunConfig
from fedpeft.config.traits import Trait
from fedpeft.errors import UpdateError
from fedpeft.rounds.downlink.state_steps import CompressedSteps, Memory, Step, Steps
from fedpeft.spaces import ServerSpace, space_traits
from fedpeft.stages import build_downlink
from fedpeft.updates.update import Arrays, arrays_digest, freeze_arrays, layout_of
from fedpeft.wire.codec import Envelope, decode, encode


def steps_of(run: RunConfig, digest: str, space: ServerSpace) -> Steps | None:
    """How a run's states follow each other; None where every state travels whole.

    Args:
        digest: of the run.
    """
    stage = build_downlink(run)
    if stage is not None:
        return CompressedSteps(digest, run.run.seed, space, stage)
    return ExactSteps(digest, space) if Trait.INTEGER_UPDATES in space_traits(space.kind) else None


@dataclass(frozen=True)
class ExactSteps:
    """Differences of states whose arrays are int64 vectors."""

    run_digest: str
    space: ServerSpace

    def make(self, number: int, state: Arrays, change: Mapping[str, NDArray[Any]], memory: Memory) -> Step:
        """Move exactly, and tell what changed."""
        after = self.space.apply(state, change)
        difference = {name: after[name] - array for name, array in state.items()}
        return Step(after, self._payload(number, difference, arrays_digest(after)))

    def take(self, state: Arrays, payload: bytes, *, who: str) -> tuple[Arrays, str]:
        """Add what changed."""
        step = decode(payload, who=who, layout=layout_of(state))
        if (step.run_digest, step.space) != (self.run_digest, self.space.kind):
            raise UpdateError(f"{who}: a step of another run or space came; restart both sides")
        moved = {name: array + step.arrays[name] for name, array in state.items()}
        return freeze_arrays(moved), step.state_digest

    def _payload(self, number: int, difference: Arrays, leads_to: str) -> bytes:
        return encode(
            Envelope(
                arrays=difference,
                run_digest=self.run_digest,
                round=number,
                state_digest=leads_to,
                space=self.space.kind,
            )
        )
