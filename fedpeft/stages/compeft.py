"""Signs of the largest entries and one scale per tensor."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from fedpeft.codec import (
    Encoded,
    FixedScale,
    LeastSquaresScale,
    ScaleRule,
    StdScale,
    TernaryTensor,
    ternarise,
)
from fedpeft.codec.topk import kept_count
from fedpeft.config import PositiveFloat, Section
from fedpeft.stages.alpha_search import SEARCH, searched
from fedpeft.stages.base import Role, StageContext
from fedpeft.stages.lossy import EVERY, Density, Float32Array, Patterns, compressed, restored
from fedpeft.update import Update
from fedpeft.wire.payloads import Payload


def _number_or_search(alpha: float | str) -> float | str:
    if alpha != SEARCH and (isinstance(alpha, str) or not 0.0 < alpha < math.inf):
        raise ValueError(f"a number above 0, or '{SEARCH}', is needed")
    return alpha


class Compeft(Section):
    """Keep the signs of the largest entries of each tensor, times one scale.

    Source: Yadav, Choshen and Raffel 2023, ComPEFT, algorithm 1; see `fedpeft.codec.ternary` for the
    differences.

    `scale` is "least-squares" (the mean kept magnitude: it can't overshoot, which error feedback needs),
    "std" (`alpha` times the standard deviation of the whole tensor, as published) or "fixed" (`value`, one
    public number for all). With alpha "search" each client takes the alpha of the published grid that has the
    lowest loss on its own held-out rows, every round.
    """

    kind: ClassVar[str] = "compeft"
    role: ClassVar[Role] = "lossy"
    payload: ClassVar[Payload] = "ternary"
    density: Density = 0.1
    scale: Literal["least-squares", "std", "fixed"] = "least-squares"
    alpha: Annotated[float | str, AfterValidator(_number_or_search)] = 1.0
    value: Annotated[PositiveFloat | None, Field(validate_default=True)] = None
    tensors: Patterns = EVERY
    error_feedback: bool = False

    @field_validator("alpha")
    @classmethod
    def _alpha_is_used(cls, alpha: float | str, info: ValidationInfo) -> float | str:
        if info.data.get("scale") not in (None, "std"):
            raise ValueError("alpha goes with scale = 'std' only")
        return alpha

    @field_validator("error_feedback")
    @classmethod
    def _contracts(cls, error_feedback: bool, info: ValidationInfo) -> bool:
        if error_feedback and info.data.get("alpha") == SEARCH:
            raise ValueError(
                f"alpha = '{SEARCH}' may overshoot, and what is fed back would grow;"
                " use scale = 'least-squares'"
            )
        return error_feedback

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
        """Compress; under alpha "search" with the alpha that serves this client's held-out rows best."""
        sent = compressed(self, update, context)
        return searched(sent, update, context) if self.alpha == SEARCH else sent

    def on_server(self, update: Update, context: StageContext) -> Update:
        """Back to float32."""
        return restored(self, update, context)

    def compress(self, name: str, delta: Float32Array, context: StageContext) -> Encoded:
        """Top-k signs; ties go to the smaller index."""
        return ternarise(delta, self.density, self._rule())

    def check(self, name: str, tensor: Encoded, context: StageContext) -> str | None:
        """At most the promised number of signs, and the public scale where it is fixed."""
        if not isinstance(tensor, TernaryTensor):
            return f"a {type(tensor).__name__} came"
        most, came = kept_count(math.prod(tensor.shape), self.density), int(np.count_nonzero(tensor.trits))
        if came > most:
            return f"{came} signs came, density {self.density:g} keeps {most}"
        if self.scale == "fixed" and tensor.scale != float(np.float32(self.value or 0.0)):
            return f"scale {tensor.scale:g} came, {self.value:g} is the run's"
        return None

    def _rule(self) -> ScaleRule:
        if self.scale == "std":
            return StdScale(1.0 if isinstance(self.alpha, str) else self.alpha)
        return LeastSquaresScale() if self.value is None else FixedScale(self.value)
