"""The largest entries, as they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

from fedpeft.codec import Encoded, SparseTensor, top_k
from fedpeft.codec.topk import count_selected
from fedpeft.config.sections import Section
from fedpeft.stages.base import Role, StageContext
from fedpeft.stages.lossy import (
    EVERY,
    Density,
    ErrorFeedback,
    Float32Array,
    Patterns,
    compress_update,
    restore_update,
)
from fedpeft.updates.update import Update
from fedpeft.wire.payloads import Payload


class TopK(Section):
    """Keep the largest entries of each tensor, and drop the rest.

    Source: Aji and Heafield 2017; per tensor, and ties go to the smaller index.
    """

    kind: ClassVar[str] = "top-k"
    role: ClassVar[Role] = "lossy"
    payload: ClassVar[Payload] = "sparse"
    density: Density = 0.1
    tensors: Patterns = EVERY
    error_feedback: ErrorFeedback = False

    def on_client(self, update: Update, context: StageContext) -> Update:
        """Compress."""
        return compress_update(self, update, context)

    def on_server(self, update: Update, context: StageContext) -> Update:
        """Back to float32."""
        return restore_update(self, update, context)

    def compress(self, deltas: Mapping[str, Float32Array], context: StageContext) -> dict[str, Encoded]:
        """The `density` fraction with the largest magnitudes."""
        return {name: top_k(delta, self.density) for name, delta in deltas.items()}

    def check(self, name: str, tensor: Encoded, context: StageContext) -> str | None:
        """At most the promised number of entries."""
        if not isinstance(tensor, SparseTensor):
            return f"a {type(tensor).__name__} came"
        most = count_selected(math.prod(tensor.shape), self.density)
        if tensor.indices.size > most:
            return f"{tensor.indices.size} entries came, density {self.density:g} keeps {most}"
        return None
