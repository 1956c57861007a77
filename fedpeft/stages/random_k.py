"""Entries at public random positions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

from fedpeft.codec import Encoded, MaskedTensor, RandomKMask, random_k, select_unbiased_random_k
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
    public_source,
    restore_update,
)
from fedpeft.updates.update import Update
from fedpeft.wire.payloads import Payload


class RandomK(Section):
    """Keep entries at random positions that everyone can compute, so that only values travel.

    The positions come from the run's seed, the round, the client and the tensor's name; they don't depend on
    the data. Values are sent times d / k, which makes the mean over seeds the update itself; under error
    feedback as they are, since what it wraps must not overshoot.

    Source: Stich, Cordonnier and Jaggi 2018, "Sparsified SGD with Memory"; Wangni et al. 2018 for d / k.
    """

    kind: ClassVar[str] = "random-k"
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
        """The `density` fraction at this client's positions of this round."""
        method = random_k if self.error_feedback else select_unbiased_random_k
        return {
            name: method(delta, self.density, public_source(self, name, context))
            for name, delta in deltas.items()
        }

    def check(self, name: str, tensor: Encoded, context: StageContext) -> str | None:
        """The run's own positions and factor: a client may not choose them."""
        if not isinstance(tensor, MaskedTensor):
            return f"a {type(tensor).__name__} came"
        size = math.prod(tensor.shape)
        count = count_selected(size, self.density)
        if tensor.mask != RandomKMask(public_source(self, name, context), count):
            return "its positions are not those of this run, round and client"
        gain = 1.0 if self.error_feedback else size / count
        return None if math.isclose(tensor.gain, gain, rel_tol=1e-6) else f"factor {tensor.gain:g} came"
