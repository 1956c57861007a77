"""Bounding what one client can add: fixed and adaptive clipping, on floats and on whole numbers.

The bound is a promise that noise is calibrated to, so the result's norm never exceeds it, rounding included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import PrivacyError, UpdateError
from fedpeft.privacy.discrete_gaussian import discrete_gaussian
from fedpeft.privacy.noise import NoiseSource
from fedpeft.updates.update import Update

# Rounding scaled entries to float32 lengthens a vector by at most 2**-24 of itself, float64 sums by less.
INWARD = 1.0 - 2.0**-20


@dataclass(frozen=True)
class Clipped:
    """An update within the bound.

    Attributes:
        update: its norm is at most the bound.
        within: whether it was before (the bit that adaptive clipping counts; private as the update is).
    """

    update: Update
    within: bool


def clip(update: Update, clip_norm: float) -> Clipped:
    """Scale an update that is longer than `clip_norm` to just below it; zero stays zero.

    Float arrays are scaled, integer arrays (whose unit is 1) scaled and cut towards zero, which never
    lengthens. The norm is over all arrays together.

    Source: McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models", flat clipping.

    Raises:
        PrivacyError: a bound that is not positive and finite.
        UpdateError: NaN or infinity in the update.
    """
    check_clip_norm(clip_norm)
    if not update.is_finite():
        raise UpdateError(
            "an update with NaN or infinity cannot be clipped; it is refused and counts as zero"
        )
    norm = update.global_norm()
    if not math.isfinite(norm):
        raise UpdateError("an update whose norm is beyond float64 came; it is refused and counts as zero")
    if norm <= clip_norm:
        return Clipped(update, within=True)
    factor = clip_norm / norm * INWARD
    return Clipped(update.map(lambda _, array: _scale(array, factor)), within=False)


def _scale(array: NDArray[Any], factor: float) -> NDArray[Any]:
    if array.dtype.kind == "f":
        return (array * factor).astype(array.dtype)
    return np.trunc(array * factor).astype(array.dtype)


def check_clip_norm(clip_norm: float) -> None:
    """Refuse a bound that bounds nothing.

    Raises:
        PrivacyError: not positive, or not finite.
    """
    if not 0.0 < clip_norm < math.inf:
        raise PrivacyError(f"clip_norm {clip_norm!r} came; a positive, finite number is needed")


@dataclass(frozen=True, kw_only=True)
class AdaptiveClipping:
    """A clipping bound that follows a quantile of the clients' norms, its state between rounds.

    Source: Andrew, Thakkar, McMahan, Ramaswamy 2021, "Differentially Private Learning with Adaptive
    Clipping", algorithm 1 and theorem 1. The bit is 1 for an update *within* the bound, so that many ones
    lower it: C <- C exp(-eta (b - gamma)). Each bit is counted as plus or minus one half, whose sensitivity
    is a half.

    Attributes:
        clip_norm: the bound C of the coming round.
        quantile: gamma, the share of updates that should be within the bound.
        learning_rate: eta.
        count_std: sigma_b, noise on the count of bits; the authors take a twentieth of the expected cohort.
    """

    clip_norm: float
    count_std: float
    quantile: float = 0.5
    learning_rate: float = 0.2

    def __post_init__(self) -> None:
        check_clip_norm(self.clip_norm)
        if not 0.0 < self.quantile < 1.0:
            raise PrivacyError(f"quantile {self.quantile!r} came; between 0 and 1 is needed")
        if not 0.0 < self.learning_rate < math.inf or not 0.0 < self.count_std < math.inf:
            raise PrivacyError(
                f"learning_rate {self.learning_rate!r} and count_std {self.count_std!r} came; both must be"
                " positive and finite"
            )

    def update_multiplier(self, noise_multiplier: float) -> float:
        """The multiplier z_delta for the updates, so that they and the bits together cost `noise_multiplier`.

        z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2), which is larger than z.

        Raises:
            PrivacyError: z is not below 2 sigma_b: the bits alone would cost more.
        """
        if not 0.0 < noise_multiplier < 2.0 * self.count_std:
            raise PrivacyError(
                f"noise_multiplier {noise_multiplier:g} and count_std {self.count_std:g} came; the"
                " multiplier must be positive and below twice count_std: raise count_std above"
                f" {noise_multiplier / 2.0:g}"
            )
        return 1.0 / math.sqrt(noise_multiplier**-2.0 - (2.0 * self.count_std) ** -2.0)

    def noisy_fraction(
        self, within: Mapping[str, bool], expected_cohort: float, source: NoiseSource
    ) -> float:
        """The released share b of updates within the bound; may leave [0, 1].

        In half units a bit is plus or minus 1, its sensitivity 1 and the noise 2 sigma_b: whole numbers, so
        the noise is exact. A client that sent nothing, or something refused, adds nothing.

        Args:
            within: by client; only of those whose update counts.
            expected_cohort: sample rate times clients: public, unlike the number that came.
        """
        halves = sum(1 if bit else -1 for bit in within.values())
        noise = int(discrete_gaussian(source, 2.0 * self.count_std, 1)[0])
        return (halves + noise) / (2.0 * expected_cohort) + 0.5

    def next(self, fraction: float) -> AdaptiveClipping:
        """The state after a round whose released share was `fraction`."""
        step = -self.learning_rate * (fraction - self.quantile)
        return replace(self, clip_norm=self.clip_norm * math.exp(step))
