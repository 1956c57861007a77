"""Small integers with one scale per channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from fedpeft.codec import Encoded, QuantisedTensor, default_channel_axis, quantise
from fedpeft.config.sections import Section, unit
from fedpeft.stages.base import Role, StageContext
from fedpeft.stages.lossy import EVERY, ErrorFeedback, Float32Array, Patterns, compress_update, restore_update
from fedpeft.updates.update import Update
from fedpeft.wire.payloads import Payload


class Quantise(Section):
    """Round stochastically to integers of 8, 4 or 2 bits with one scale per channel.

    Unbiased. Error feedback goes with 8 and 4 bits: to two bits an entry is rounded by up to the channel's
    maximum, and what is fed back would grow.

    Source: Alistarh, Grubic, Li, Tomioka and Vojnovic 2017, QSGD, section 3.1, with the maximum per channel
    in place of the norm.
    """

    kind: ClassVar[str] = "quantise"
    role: ClassVar[Role] = "lossy"
    payload: ClassVar[Payload] = "quantised"
    bits: Annotated[Literal[8, 4, 2], unit("bits")] = Field(8, description="Size of an entry.")
    tensors: Patterns = EVERY
    error_feedback: ErrorFeedback = False

    @field_validator("error_feedback")
    @classmethod
    def _contracts(cls, error_feedback: bool, info: ValidationInfo) -> bool:
        if error_feedback and info.data.get("bits") == 2:
            raise ValueError("rounding to 2 bits overshoots; use 4 or 8 bits, or 'ternary' instead")
        return error_feedback

    def on_client(self, update: Update, context: StageContext) -> Update:
        """Compress."""
        return compress_update(self, update, context)

    def on_server(self, update: Update, context: StageContext) -> Update:
        """Back to float32."""
        return restore_update(self, update, context)

    def compress(self, deltas: Mapping[str, Float32Array], context: StageContext) -> dict[str, Encoded]:
        """Rounded by the client's coins of this round and tensor."""
        return {
            name: quantise(
                delta, self.bits, context.rng(f"{self.kind}/{name}"), default_channel_axis(delta.shape)
            )
            for name, delta in deltas.items()
        }

    def check(self, name: str, tensor: Encoded, context: StageContext) -> str | None:
        """The promised width and channels."""
        if not isinstance(tensor, QuantisedTensor):
            return f"a {type(tensor).__name__} came"
        if tensor.bits != self.bits or tensor.channel_axis != default_channel_axis(tensor.shape):
            return f"{tensor.bits} bits along axis {tensor.channel_axis} came, the run file says otherwise"
        return None
