"""Signs of the largest entries of each tensor, and one scale per tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, ValidationInfo, field_validator

from fedpeft.codec import Encoded, FixedScale, LeastSquaresScale, TernaryTensor, ternarise
from fedpeft.codec.topk import count_selected
from fedpeft.config.sections import PositiveFloat, Section, unit
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


class Ternary(Section):
    """Keep the signs of the largest entries of each tensor, times their mean size.

    Source: Sattler, Wiedemann, Mueller and Samek 2019, sparse ternary compression, algorithm 1.

    `scale` is "least-squares" (the mean kept magnitude, which is closest to the tensor and cannot overshoot,
    as error feedback needs) or "fixed" (`value`, one public number for all).
    """

    kind: ClassVar[str] = "ternary"
    role: ClassVar[Role] = "lossy"
    payload: ClassVar[Payload] = "ternary"
    density: Density = 0.1
    scale: Literal["least-squares", "fixed"] = Field(
        "least-squares", description="The mean kept magnitude, or the number in value."
    )
    value: Annotated[PositiveFloat, unit("parameter")] | None = Field(
        None,
        validate_default=True,
        description="For scale fixed: the scale of every tensor. Default: none; it is needed there.",
    )
    tensors: Patterns = EVERY
    error_feedback: ErrorFeedback = False

    @field_validator("value")
    @classmethod
    def _value_is_used(cls, value: float | None, info: ValidationInfo) -> float | None:
        scale = info.data.get("scale")
        if scale == "fixed" and value is None:
            raise ValueError("scale = 'fixed' needs a value")
        if scale not in (None, "fixed") and value is not None:
            raise ValueError("value goes with scale = 'fixed' only")
        return value

    def on_client(self, update: Update, context: StageContext) -> Update:
        """Compress."""
        return compress_update(self, update, context)

    def on_server(self, update: Update, context: StageContext) -> Update:
        """Back to float32."""
        return restore_update(self, update, context)

    def compress(self, deltas: Mapping[str, Float32Array], context: StageContext) -> dict[str, Encoded]:
        """Top-k signs; ties go to the smaller index."""
        rule = LeastSquaresScale() if self.value is None else FixedScale(self.value)
        return {name: ternarise(delta, self.density, rule) for name, delta in deltas.items()}

    def check(self, name: str, tensor: Encoded, context: StageContext) -> str | None:
        """At most the promised number of signs, and the public scale where it is fixed."""
        if not isinstance(tensor, TernaryTensor):
            return f"a {type(tensor).__name__} came"
        most, came = (
            count_selected(math.prod(tensor.shape), self.density),
            int(np.count_nonzero(tensor.trits)),
        )
        if came > most:
            return f"{came} signs came, density {self.density:g} keeps {most}"
        if self.scale == "fixed" and tensor.scale != float(np.float32(self.value or 0.0)):
            return f"scale {tensor.scale:g} came, {self.value:g} is the run's"
        return None
