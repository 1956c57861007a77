"""Seed-scalars as the run file describes them, before there is a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from fedpeft.config.deployment import clients_named
from fedpeft.config.sampling import cohort_size
from fedpeft.config.sections import Count, RunConfig, Section, TrainingSection, unit
from fedpeft.config.traits import Trait, Traits
from fedpeft.errors import RunFileError
from fedpeft.spaces.seed_modes import CommonDirections, FixedSeeds, Mode, WeightedSeeds

if TYPE_CHECKING:
    from torch import nn

    from fedpeft.spaces.seed_scalars import SeedScalars

RESOLUTION = 8  # bits: a scalar of 1 moves lr, or 2**8 quanta up to a factor of two
LARGEST = 2**24  # quanta that one client may move along one direction in one round
PUBLISHED_CLIP = 1000.0  # of a scalar's size, in FedKSeed-Pro's amplitudes
SUPPORTED_RULES = frozenset(
    {"block-wise", "hybrid", "sparse"}
)  # of training, whose directions move some weights

_OF_MODE: Mapping[str, Traits] = {
    "fedkseed": frozenset({Trait.SPARSE_VISITS, Trait.FIXED_DIRECTIONS}),
    "fedkseed-pro": frozenset({Trait.SPARSE_VISITS, Trait.VISIT_COUNTS}),
    "common": frozenset({Trait.ROUND_DIRECTIONS}),
}


class SeedScalarsOptions(Section):
    """Seed-scalars as the run file describes them.

    `num_seeds` is K, or with mode "common" the directions of one round. The quantum is 2**quantum_exponent;
    by default the power of two at or below ``lr * 2**-8``.
    """

    kind: ClassVar[str] = "seed-scalars"
    declares: ClassVar[Traits] = frozenset({Trait.INTEGER_UPDATES, Trait.SEEDED_MOVES})

    mode: Literal["fedkseed", "fedkseed-pro", "common"] = Field(
        "fedkseed",
        description=(
            "Directions fixed for the run, the same drawn by how much they moved, or directions of each"
            " round, the same for all its clients."
        ),
    )
    num_seeds: Annotated[Count, unit("directions")] = Field(
        4096, description="Directions of the run, or with mode common of one round."
    )
    quantum_exponent: Annotated[int, unit("power of 2")] | None = Field(
        None,
        description=(
            "Scalars are whole multiples of 2 to this power. Default: the power at or below"
            " training.lr / 256."
        ),
    )

    @property
    def traits(self) -> Traits:
        """What the mode adds."""
        return self.declares | _OF_MODE[self.mode]

    def open(self, run: RunConfig, model: nn.Module) -> SeedScalars:
        """Take theta_0 from the model.

        Raises:
            ModelError: nothing is trainable, or a trainable tensor is not contiguous.
            UpdateError: K or the quantum is out of range.
        """
        from fedpeft.seedspace.space import SeedSpace  # with a model, as all of these bring torch
        from fedpeft.seedspace.trainable_tensors import trainable_shapes
        from fedpeft.spaces.directions import direction_stream
        from fedpeft.spaces.seed_scalars import SeedScalars

        exponent, mode = self.exponent(run.training.lr), self.mode_of(run)
        space = SeedSpace(direction_stream(run, model), mode.num_seeds, exponent, trainable_shapes(model))
        return SeedScalars(space, mode, model, largest_amount(run, exponent))

    def exponent(self, lr: float) -> int:
        """log2 of the quantum."""
        default = math.frexp(lr)[1] - 1 - RESOLUTION  # frexp's mantissa is in [1/2, 1)
        return default if self.quantum_exponent is None else self.quantum_exponent

    def mode_of(self, run: RunConfig) -> Mode:
        """Directions and bookkeeping of the run's method."""
        if self.mode == "common":
            buffer = run.federation.buffer
            return CommonDirections(
                self.num_seeds, run.run.rounds, 1 if buffer is None else buffer.max_staleness + 1
            )
        if self.mode == "fedkseed-pro":
            largest = quanta(PUBLISHED_CLIP * run.training.lr, self.exponent(run.training.lr))
            return WeightedSeeds(self.num_seeds, largest, estimate_cohort(run))
        return FixedSeeds(self.num_seeds)


def estimate_cohort(run: RunConfig) -> int:
    """Return how many clients a round is expected to average, from the run file alone.

    Raises:
        RunFileError: it doesn't say.
    """
    sampling, clients = run.federation.sampling, clients_named(run)
    if sampling.kind == "fixed":
        return sampling.cohort or 1
    if not clients:
        raise RunFileError(
            "run file",
            [
                "space.mode 'fedkseed-pro' has to know how many clients a round averages; set"
                " federation.sampling = { kind = 'fixed', cohort = N }, or data.partitioner.clients"
            ],
        )
    return cohort_size(sampling, clients)


def quanta(length: float, exponent: int) -> int:
    """A positive length in quanta, rounded up, at most `LARGEST`."""
    return min(LARGEST, math.ceil(math.ldexp(length, -exponent)))


def largest_amount(run: RunConfig, exponent: int) -> int:
    """The most quanta along one direction that an honest client of any group can reach in a round.

    With `training.max_scalar` and `training.steps` that is what all visits to one direction add up to;
    otherwise the general bound.
    """
    parts = [run, *(run.of_group(group) for group in run.groups)]
    return max(_largest_amount(part.training, exponent) for part in parts)


def _largest_amount(training: TrainingSection, exponent: int) -> int:
    if training.max_scalar is None or training.steps is None:
        return LARGEST
    return min(
        LARGEST, training.steps * training.queries * quanta(training.lr * training.max_scalar, exponent)
    )
