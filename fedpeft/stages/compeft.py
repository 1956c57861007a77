"""ComPEFT as published: the signs of the largest entries of the whole update, and one scale for all of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar

import numpy as np
from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from fedpeft.codec import Encoded, StdScale, TernaryTensor, ternarise_together
from fedpeft.codec.topk import count_selected
from fedpeft.config.sections import Section, unit
from fedpeft.config.traits import Trait, Traits, choose_traits
from fedpeft.errors import UpdateError
from fedpeft.stages.alpha_search import SEARCH, search_alpha
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


def _number_or_search(alpha: float | str) -> float | str:
    if alpha != SEARCH and (isinstance(alpha, str) or not 0.0 < alpha < math.inf):
        raise ValueError(f"a number above 0, or '{SEARCH}', is needed")
    return alpha


class Compeft(Section):
    """Keep the signs of the largest entries of the whole update, times alpha standard deviations of it.

    Source: Yadav, Choshen and Raffel 2023, ComPEFT, algorithm 1. Ties have a fixed order; tensors that never
    moved are left out of the cut and of the deviation, as they are no part of what was trained.

    With alpha "search" each client takes the alpha of the published grid that has the lowest loss on its own
    held-out rows, every round. Error feedback is no part of the paper. LoRA's two factors differ in size, so
    that one cut can leave one of them out; stage "ternary" cuts each tensor by itself.
    """

    kind: ClassVar[str] = "compeft"
    role: ClassVar[Role] = "lossy"
    payload: ClassVar[Payload] = "ternary"
    density: Density = 0.1
    alpha: Annotated[float | str, AfterValidator(_number_or_search), unit("standard deviations")] = Field(
        1.0,
        description=(
            "Size of the sent entries, as a multiple of the update's standard deviation; 'search': the best"
            " one on each client's held-out rows."
        ),
    )
    tensors: Patterns = EVERY
    error_feedback: ErrorFeedback = False

    @property
    def traits(self) -> Traits:
        """A search for alpha asks the client's rows."""
        return choose_traits({Trait.READS_ROWS_AGAIN: self.alpha == SEARCH})

    @field_validator("error_feedback")
    @classmethod
    def _contracts(cls, error_feedback: bool, info: ValidationInfo) -> bool:
        if error_feedback and info.data.get("alpha") == SEARCH:
            raise ValueError(
                f"alpha = '{SEARCH}' may overshoot, and what is fed back would grow; use stage 'ternary'"
            )
        return error_feedback

    def on_client(self, update: Update, context: StageContext) -> Update:
        """Compress; under alpha "search" with the alpha that serves this client's held-out rows best."""
        sent = compress_update(self, update, context)
        return search_alpha(sent, update, context) if self.alpha == SEARCH else sent

    def on_server(self, update: Update, context: StageContext) -> Update:
        """Back to float32.

        Raises:
            UpdateError: a tensor in another form, more signs than the density keeps of all, or two scales.
        """
        result = restore_update(self, update, context)
        tensors = {name: sent for name, sent in update.encoded.items() if isinstance(sent, TernaryTensor)}
        most, came = count_selected(sum(sent.trits.size for sent in tensors.values()), self.density), 0
        scales: set[float] = set()
        for name, sent in tensors.items():
            kept = int(np.count_nonzero(sent.trits))
            came += kept
            scales |= {sent.scale} if kept else set()
            problem = ""
            if came > most:
                problem = f"{came} signs came up to it, density {self.density:g} keeps {most} of the update"
            elif len(scales) > 1:
                problem = f"scale {sent.scale:g} came, all tensors of an update have one"
            if problem:
                raise UpdateError(f"{context.client}: array {name!r} breaks stage '{self.kind}': {problem}")
        return result

    def compress(self, deltas: Mapping[str, Float32Array], context: StageContext) -> dict[str, Encoded]:
        """Top-k signs of all entries together; ties go to the earlier name and the smaller index."""
        alpha = 1.0 if isinstance(self.alpha, str) else self.alpha
        return {**ternarise_together(deltas, self.density, StdScale(alpha))}

    def check(self, name: str, tensor: Encoded, context: StageContext) -> str | None:
        """The promised form; what all tensors promise together is checked in `on_server`."""
        return None if isinstance(tensor, TernaryTensor) else f"a {type(tensor).__name__} came"
