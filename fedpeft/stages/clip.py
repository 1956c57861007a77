"""Bounding how far one client can move the model."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from fedpeft.config.sections import PositiveFloat, Section, unit
from fedpeft.config.traits import Trait, Traits
from fedpeft.errors import UpdateError
from fedpeft.stages.base import Role, StageContext
from fedpeft.updates.update import Update
from fedpeft.wire.payloads import Payload

ROUNDING = 1e-5  # float32 scaling of d entries moves the norm by far less than this share


class Clip(Section):
    """Scale an update whose L2 norm exceeds `clip_norm` down to it.

    Source: McMahan et al. 2018, algorithm 1, flat clipping.

    An all-zero update stays zero. The server clips again, so that a client that didn't can't exceed the bound
    by more than float rounding. Where a lossy stage follows, the server clips what was decompressed.
    """

    kind: ClassVar[str] = "clip"
    role: ClassVar[Role] = "bound"
    payload: ClassVar[Payload] = "dense"
    traits: ClassVar[Traits] = frozenset({Trait.SCALES})

    clip_norm: Annotated[PositiveFloat, unit("L2 norm")] = Field(
        description="Bound of an update, in the space's own unit."
    )

    def on_client(self, update: Update, context: StageContext) -> Update:
        """Clip to `clip_norm`."""
        return self._clip(update)

    def on_server(self, update: Update, context: StageContext) -> Update:
        """Clip what was not clipped.

        Raises:
            UpdateError: a norm that is not finite.
        """
        if not update.is_finite():
            raise UpdateError("an update with NaN or infinity came; a finite one is needed")
        return self._clip(update) if update.global_norm() > self.clip_norm * (1 + ROUNDING) else update

    def _clip(self, update: Update) -> Update:
        norm = update.global_norm()
        return update.scale(self.clip_norm / norm) if norm > self.clip_norm else update
