"""Local privacy: the client adds its own noise, and the server need not be trusted.

The clipped update is rounded to a grid of 2**quantum_exponent, so that the noise on it is whole numbers and
exact; only the noised result becomes floats again. Weight and metrics are dropped, since they would tell what
the noise hides. Send the noised update's bytes again after a fault; a second draw is a second, unpaid
release.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import PrivacyError
from fedpeft.privacy.central import noise_like, sensitivity_quanta
from fedpeft.privacy.clipping import check_clip_norm, clip
from fedpeft.privacy.events import Local
from fedpeft.privacy.noise import NoiseSource
from fedpeft.updates.update import Update

GRID_BITS = 30  # quanta per clip_norm, as a power of two: rounding adds a billionth of the bound per entry


@dataclass(frozen=True, kw_only=True)
class LocalMechanism:
    """What a client promises itself.

    Attributes:
        clip_norm: bound on the update's L2 norm.
        noise_multiplier: noise's standard deviation over `clip_norm`, per entry.
    """

    clip_norm: float
    noise_multiplier: float

    def __post_init__(self) -> None:
        check_clip_norm(self.clip_norm)
        self.event()

    def event(self) -> Local:
        """What one update releases."""
        return Local(noise_multiplier=self.noise_multiplier)

    def privatise(self, update: Update, source: NoiseSource) -> Update:
        """Clip, round to the grid, add noise; weight 1 and no metrics.

        An update that isn't finite becomes zero before the noise: refusing to send would tell about the data.

        Raises:
            PrivacyError: arrays of floats and of integers in one update.
        """
        kinds = {array.dtype.kind for array in update.arrays.values()}
        if len(kinds) != 1:
            raise PrivacyError(f"arrays of kinds {sorted(kinds)} came; one update holds floats or integers")
        integral = kinds != {"f"}
        exponent = 0 if integral else math.frexp(self.clip_norm)[1] - GRID_BITS
        if not update.is_finite() or not math.isfinite(update.global_norm()):
            update = update.map(lambda _, array: np.zeros_like(array))
        clipped = clip(update, self.clip_norm).update
        size = 0 if integral else sum(array.size for array in clipped.arrays.values())
        std = self.noise_multiplier * sensitivity_quanta(self.clip_norm, exponent, size)

        def noised(_: str, array: NDArray[np.generic]) -> NDArray[np.generic]:
            quanta = np.rint(np.ldexp(array.astype(np.float64), -exponent)).astype(np.int64)
            quanta += noise_like(source, std, quanta)
            return (quanta if integral else np.ldexp(quanta.astype(np.float64), exponent)).astype(array.dtype)

        return Update(clipped.map(noised).arrays)
