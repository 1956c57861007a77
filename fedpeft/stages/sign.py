"""One bit per entry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from fedpeft.codec import Encoded, SignTensor, sign_with_scale
from fedpeft.config.sections import Section
from fedpeft.stages.base import Role, StageContext
from fedpeft.stages.lossy import EVERY, ErrorFeedback, Float32Array, Patterns, compress_update, restore_update
from fedpeft.updates.update import Update
from fedpeft.wire.payloads import Payload


class Sign(Section):
    """Send each entry's sign, and the mean magnitude of the tensor.

    Made for error feedback: without it, the directions of small entries are as loud as those of large ones.

    Source: Karimireddy, Rebjock, Stich and Jaggi 2019, "Error Feedback Fixes SignSGD".
    """

    kind: ClassVar[str] = "sign"
    role: ClassVar[Role] = "lossy"
    payload: ClassVar[Payload] = "sign"
    tensors: Patterns = EVERY
    error_feedback: ErrorFeedback = False

    def on_client(self, update: Update, context: StageContext) -> Update:
        """Compress."""
        return compress_update(self, update, context)

    def on_server(self, update: Update, context: StageContext) -> Update:
        """Back to float32."""
        return restore_update(self, update, context)

    def compress(self, deltas: Mapping[str, Float32Array], context: StageContext) -> dict[str, Encoded]:
        """Signs times ||delta||_1 / d."""
        return {name: sign_with_scale(delta) for name, delta in deltas.items()}

    def check(self, name: str, tensor: Encoded, context: StageContext) -> str | None:
        """The promised form."""
        return None if isinstance(tensor, SignTensor) else f"a {type(tensor).__name__} came"
