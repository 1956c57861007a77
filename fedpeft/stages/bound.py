"""Client-level privacy on the client: nobody sends more than the server will count."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from fedpeft.config.sections import PositiveFloat, Section, unit
from fedpeft.privacy.clipping import clip
from fedpeft.stages.base import Role, StageContext
from fedpeft.updates.update import Update
from fedpeft.wire.payloads import Payload


class Bound(Section):
    """Clip to the `clip_norm` of [privacy] before anything else, floats and whole numbers alike.

    The promise does not rest on it: the server clips what it decoded, whoever sent it. It is here so that an
    honest client's compression works on the update that counts.
    """

    kind: ClassVar[str] = "bound"
    role: ClassVar[Role] = "bound"
    payload: ClassVar[Payload] = "dense"

    clip_norm: Annotated[PositiveFloat, unit("L2 norm")] = Field(
        description="Bound of an update, in the space's own unit."
    )

    def on_client(self, update: Update, context: StageContext) -> Update:
        """Clip.

        Raises:
            UpdateError: the update is not finite; the server counts it as zero.
        """
        return clip(update, self.clip_norm).update

    def on_server(self, update: Update, context: StageContext) -> Update:
        """Return `update`; the sum clips it."""
        return update
