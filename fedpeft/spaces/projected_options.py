"""The projected space as the run file describes it, before there is a model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from fedpeft.config import Count, PositiveFloat, RunConfig, Section
from fedpeft.seedspace.layout import tensor_ids

if TYPE_CHECKING:
    from torch import nn

    from fedpeft.spaces.projected import Projected

RESOLUTION = 10  # bits: a change of lr in one weight is 2**10 quanta up to a factor of two
FEWEST = 2  # coefficients of a tensor


class ProjectedOptions(Section):
    """A projected space as the run file describes it.

    `num_seeds` is the number of coefficients of the largest tensor; a smaller one of d weights gets them in
    proportion to sqrt(d), as norms go when all weights change alike, so that everybody knows the numbers
    beforehand. The server moves by `server_lr` times the rebuilt mean change.

    With `feedback` each client adds what its earlier coefficients left out to its next change. An unbiased
    rebuilt change is far longer than the change itself, and what it leaves out would grow from round to
    round: so coefficients are then those of the nearest rebuilt change, which is shorter and not unbiased. A
    client keeps eight bytes for each weight. With another `server_lr` than 1 the server moves by more or less
    than what clients count as sent.
    """

    kind: ClassVar[str] = "projected"

    projection: Literal["signs", "srht"] = "signs"
    num_seeds: Count = 256
    server_lr: PositiveFloat = 1.0
    feedback: bool = False
    quantum_exponent: int | None = None

    def open(self, run: RunConfig, model: nn.Module) -> Projected:
        """Take theta_0 from the model."""
        from fedpeft.seedspace.trainable import trainable_parameters  # with a model, as they bring torch
        from fedpeft.spaces.projected import Projected
        from fedpeft.spaces.projections import PROJECTIONS

        live = trainable_parameters(model)
        widest = max(parameter.numel() for parameter in live.values())
        projections = {}
        for name, number in tensor_ids(live).items():
            size = live[name].numel()
            count = max(FEWEST, math.floor(self.num_seeds * math.sqrt(size / widest)))
            build = PROJECTIONS[self.projection]
            projections[name] = build(run.run.seed, number, size, count, shrinks=self.feedback)
        exponent = self.quantum_exponent
        if exponent is None:
            exponent = math.frexp(run.training.lr)[1] - 1 - RESOLUTION
            if self.feedback:  # coefficients are smaller by their number over the weights they stand for
                exponent -= max(
                    live[name].numel() // part.count for name, part in projections.items()
                ).bit_length()
        return Projected(live, projections, exponent, run.run.rounds, self.server_lr, self.feedback)
