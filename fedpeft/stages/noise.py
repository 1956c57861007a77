"""Local privacy as a stage: the client's own noise, on an update that is clipped in the same hook."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

from pydantic import Field

from fedpeft.config.sections import PositiveFloat, Section, unit
from fedpeft.privacy.local import LocalMechanism
from fedpeft.privacy.noise import NoiseSource, SeededNoise, SystemNoise
from fedpeft.stages.base import Role, StageContext
from fedpeft.updates.update import Update
from fedpeft.wire.payloads import Payload


class Noise(Section):
    """The noise of [privacy] kind 'local', at this place; unnamed it comes first.

    It clips to the section's `clip_norm` and drops weight and metrics. What stands behind it works on the
    noised update, which costs nothing; nothing lossy may stand before it. All options come from `[privacy]`.
    """

    kind: ClassVar[str] = "noise"
    role: ClassVar[Role] = "noise"
    payload: ClassVar[Payload] = "dense"

    clip_norm: Annotated[PositiveFloat, unit("L2 norm")] = Field(description="As in [privacy].")
    noise_multiplier: Annotated[PositiveFloat, unit("ratio")] = Field(description="As in [privacy].")
    seeded: bool = Field(False, description="As in [privacy].")

    def on_client(self, update: Update, context: StageContext) -> Update:
        """Clip and add noise; an update that isn't finite becomes zero and is noised all the same."""
        mechanism = LocalMechanism(clip_norm=self.clip_norm, noise_multiplier=self.noise_multiplier)
        return mechanism.privatise(update, self._source(context))

    def on_server(self, update: Update, context: StageContext) -> Update:
        """Nothing takes noise away; what came beside it is not looked at."""
        return replace(update, weight=1, metrics={})

    def _source(self, context: StageContext) -> NoiseSource:
        return SeededNoise(context.rng("privacy noise")) if self.seeded else SystemNoise()
