"""The projected space as the run file describes it, before there is a model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from fedpeft.config.sections import Count, PositiveFloat, RunConfig, Section, TrainingSection, unit
from fedpeft.config.traits import Trait, Traits, choose_traits
from fedpeft.seedspace.layout import tensor_ids
from fedpeft.spaces.allocation import FEWEST

if TYPE_CHECKING:
    from torch import nn

    from fedpeft.spaces.projected import Projected

RESOLUTION = 2  # quanta of a typical coefficient: rounding adds two percent to the error's square


class ProjectedOptions(Section):
    """A projected space as the run file describes it.

    `num_seeds` is the number of coefficients of the largest tensor; a smaller one of d weights gets them in
    proportion to sqrt(d), as norms go when all weights change alike, so that everybody knows the numbers
    beforehand. With `allocation` "norm" that is so in the first round only: in a later one the same number of
    coefficients is shared out by how far each tensor has moved, as the coefficients of all rounds so far say.
    The server moves by `server_lr` times the rebuilt mean change.

    With `direction_sets` S a round has S sets of directions, and a client takes the one that a digest of its
    own change names. An update is a vector of S times K with zeros outside of its set, so sums and means,
    masked ones too, are what they are with one set; only rules that compare clients' coefficients need S = 1.

    The quantum is 2**quantum_exponent; by default it follows from how far `training` is expected to move a
    weight in a round, the largest tensor's d weights and its K coefficients: a coefficient of a change of
    delta per weight is delta sqrt(d) / K, and shall be `RESOLUTION` quanta, so that rounding adds 1 / (12
    RESOLUTION**2) to the square of an error that the projection makes anyway.
    """

    kind: ClassVar[str] = "projected"
    declares: ClassVar[Traits] = frozenset(
        {
            Trait.INTEGER_UPDATES,
            Trait.PROJECTS_CHANGES,
            Trait.ROUND_DIRECTIONS,
            Trait.ONE_ROUND_SUMS,
            Trait.DEPENDS_ON_EARLIER,
        }
    )

    projection: Literal["signs", "srht"] = Field(
        "signs", description="Random signs, or a subsampled randomised Hadamard transform."
    )
    num_seeds: Annotated[Count, unit("coefficients")] = Field(
        256,
        description=(
            "Coefficients of the largest tensor; a smaller one of d weights gets them in proportion"
            " to sqrt(d)."
        ),
    )
    allocation: Literal["size", "norm"] = Field(
        "size",
        description=(
            "Coefficients of a tensor go by the square root of its size, or after the first round by how"
            " far it moved so far (projection signs only)."
        ),
    )
    direction_sets: Annotated[Count, unit("sets")] = Field(
        1,
        description=(
            "Sets of directions in a round, of which a client uses one; as many as a round has clients"
            " gives nearly each its own. The way down grows with it."
        ),
    )
    server_lr: Annotated[PositiveFloat, unit("factor")] = Field(
        1.0, description="The server moves by this times the rebuilt mean change."
    )
    quantum_exponent: Annotated[int, unit("power of 2")] | None = Field(
        None,
        description=(
            "Coefficients are whole multiples of 2 to this power. Default: follows from how far"
            " [training] is expected to move a weight."
        ),
    )

    @model_validator(mode="after")
    def _check_allocation(self) -> Self:
        if self.allocation == "norm" and self.projection != "signs":
            raise ValueError(
                f"allocation 'norm' gives a tensor any number of coefficients, which projection"
                f" '{self.projection}' can't; set projection 'signs' or allocation 'size'"
            )
        return self

    @property
    def traits(self) -> Traits:
        """With several sets of directions most coefficients come from one client or none."""
        return self.declares | choose_traits({Trait.SPARSE_VISITS: self.direction_sets > 1})

    def open(self, run: RunConfig, model: nn.Module) -> Projected:
        """Take theta_0 from the model."""
        from fedpeft.seedspace.trainable_tensors import (
            trainable_parameters,  # with a model, as they bring torch
        )
        from fedpeft.spaces.projected import Projected
        from fedpeft.spaces.projections import PROJECTIONS

        live = trainable_parameters(model)
        widest = max(parameter.numel() for parameter in live.values())
        projections = {}
        for name, number in tensor_ids(live).items():
            size = live[name].numel()
            count = max(FEWEST, math.floor(self.num_seeds * math.sqrt(size / widest)))
            build = PROJECTIONS[self.projection]
            projections[name] = build(run.run.seed, number, size, count)
        exponent = self.quantum_exponent
        if exponent is None:
            total = sum(parameter.numel() for parameter in live.values())
            exponent = fitting_exponent(estimate_move(run.training, total), widest, self.num_seeds)
        return Projected(
            live,
            projections,
            exponent,
            run.run.rounds,
            self.server_lr,
            sets=self.direction_sets,
            by_norm=self.allocation == "norm",
        )


def fitting_exponent(move: float, size: int, count: int) -> int:
    """Return log2 of a quantum of which typical coefficients and weights have `RESOLUTION` at least.

    Args:
        move: how far a weight moves.
        size: weights of the tensor.
        count: its coefficients.
    """
    return math.floor(math.log2(move * min(1.0, math.sqrt(size) / count) / RESOLUTION))


def estimate_move(section: TrainingSection, parameters: int) -> float:
    """Return about how far a round of local steps moves a weight, before any step is made.

    Steps are taken to have unrelated directions. An optimiser that divides by the size of gradients moves a
    weight by lr in each; another moves the whole model by lr times the norm of a gradient, which is taken
    to be `max_grad_norm`, or 1.

    Args:
        parameters: how many weights are trained.
    """
    steps = section.steps or 1
    length = section.lr * math.sqrt(steps)
    if section.optimizer == "sgd":
        length *= (section.max_grad_norm or 1.0) / math.sqrt(parameters) / (1.0 - section.momentum)
    return length
