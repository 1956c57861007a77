"""Drop at random and rescale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field, field_validator

from fedpeft.codec import BernoulliMask, Encoded, MaskedTensor, dare
from fedpeft.codec.masks import keep_threshold
from fedpeft.config.sections import Section, unit
from fedpeft.stages.base import Role, StageContext
from fedpeft.stages.lossy import (
    EVERY,
    ErrorFeedback,
    Float32Array,
    Patterns,
    compress_update,
    public_source,
    restore_update,
)
from fedpeft.updates.update import Update
from fedpeft.wire.payloads import Payload


class Dare(Section):
    """Drop each entry with probability `drop_rate` and rescale the rest by 1 / (1 - drop_rate).

    Positions are public, as those of `random-k`; the mean over seeds is the update itself. There is no error
    feedback for it: the rescaling overshoots, and from a drop rate of 0.5 on what is fed back would grow
    without end.

    Source: Yu, Yu, Yu, Huang and Li 2024, "Language Models are Super Mario".
    """

    kind: ClassVar[str] = "dare"
    role: ClassVar[Role] = "lossy"
    payload: ClassVar[Payload] = "sparse"
    drop_rate: Annotated[float, Field(ge=0.0, lt=1.0), unit("probability")] = Field(
        0.9, description="Each entry's chance to be dropped."
    )
    tensors: Patterns = EVERY
    error_feedback: ErrorFeedback = False

    @field_validator("error_feedback")
    @classmethod
    def _never(cls, error_feedback: bool) -> bool:
        if error_feedback:
            raise ValueError(
                "its rescaling overshoots; use 'random-k' for random positions with error feedback"
            )
        return error_feedback

    def on_client(self, update: Update, context: StageContext) -> Update:
        """Compress."""
        return compress_update(self, update, context)

    def on_server(self, update: Update, context: StageContext) -> Update:
        """Back to float32."""
        return restore_update(self, update, context)

    def compress(self, deltas: Mapping[str, Float32Array], context: StageContext) -> dict[str, Encoded]:
        """What this client's coins of this round keep."""
        return {
            name: dare(delta, self.drop_rate, public_source(self, name, context))
            for name, delta in deltas.items()
        }

    def check(self, name: str, tensor: Encoded, context: StageContext) -> str | None:
        """The run's own coins and factor: a client may not choose them."""
        if not isinstance(tensor, MaskedTensor):
            return f"a {type(tensor).__name__} came"
        wanted = BernoulliMask(public_source(self, name, context), keep_threshold(1.0 - self.drop_rate))
        if tensor.mask != wanted:
            return "its positions are not those of this run, round and client"
        gain = 1.0 / (1.0 - self.drop_rate)
        return None if math.isclose(tensor.gain, gain, rel_tol=1e-6) else f"factor {tensor.gain:g} came"
