"""What record-level privacy promises about a client's rows, and which of them a step takes."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedpeft.data.encoded import Encoded
from fedpeft.errors import PrivacyError
from fedpeft.privacy.central import sensitivity_quanta
from fedpeft.privacy.clipping import check_clip_norm
from fedpeft.privacy.events import PersonLevel, RecordLevel
from fedpeft.privacy.noise import NoiseSource, coins
from fedpeft.training.first_order import Rows

GRID_BITS = 30  # quanta per max_grad_norm, as a power of two


@dataclass(frozen=True, kw_only=True)
class RecordMechanism:
    """What a client promises about each of its rows; every number is public, and chosen without their help.

    Clipped contributions are rounded to whole quanta of ``2**exponent``, so that sums and noise are exact
    integers; the sensitivity prices the rounding.

    Attributes:
        max_grad_norm: bound on what each example adds, over all trained tensors (or directions) together.
        noise_multiplier: noise's standard deviation over `max_grad_norm`.
        sample_rate: each row's chance to enter a step.
        expected_batch_size: what noised sums are divided by. Sample rate times the number of rows, where that
            number may be known; else any public guess of it.
        unit: what is protected and sampled. A person enters a step by one coin, with one of his rows.
    """

    max_grad_norm: float
    noise_multiplier: float
    sample_rate: float
    expected_batch_size: float
    unit: Literal["record", "person"] = "record"

    def __post_init__(self) -> None:
        check_clip_norm(self.max_grad_norm)
        if not 0.0 < self.expected_batch_size < float("inf"):
            raise PrivacyError(
                f"expected_batch_size {self.expected_batch_size!r} came; a positive number is needed"
            )
        self.event(1)

    def event(self, steps: int) -> RecordLevel | PersonLevel:
        """What so many steps release."""
        unit = RecordLevel if self.unit == "record" else PersonLevel
        return unit(noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate, steps=steps)

    @property
    def exponent(self) -> int:
        """Log2 of the quantum that contributions are rounded to."""
        return math.frexp(self.max_grad_norm)[1] - GRID_BITS

    def sensitivity(self, entries: int) -> float:
        """How far, in quanta, one unit moves a step's sum of so many entries: the bound and the rounding."""
        return sensitivity_quanta(self.max_grad_norm, self.exponent, entries)

    def noise_std(self, entries: int) -> float:
        """Standard deviation of the noise on each of so many entries, in quanta."""
        return self.noise_multiplier * self.sensitivity(entries)


def draw_rows(
    rows: Rows, mechanism: RecordMechanism, source: NoiseSource, step_key: int
) -> NDArray[np.int64]:
    """Return a step's rows, int64[B]: those whose own coin shows heads, or one row of each such person.

    A person's row is the one with the smallest `row_number` among his own, so nobody else's rows have a part
    in the choice. It is bounded as a record is: whoever is added or removed moves the clipped sum by at most
    the bound, with the probability that the coin has.

    Args:
        source: of the coins, which must be secret.
        step_key: of the step; public.

    Raises:
        PrivacyError: persons are protected and the rows don't say whose they are.
    """
    if mechanism.unit == "record":
        return rows.indices[coins(source, mechanism.sample_rate, len(rows.indices))]
    if rows.encoded.users is None:
        raise PrivacyError("persons are to be protected and the rows don't say whose they are; set data.user")
    persons, person = np.unique(rows.encoded.users[rows.indices], return_inverse=True)
    heads = coins(source, mechanism.sample_rate, len(persons))[person.reshape(-1)]
    candidates = rows.indices[heads]
    numbers = np.array([row_number(rows.encoded, int(i), step_key) for i in candidates], dtype=np.uint64)
    ordered = candidates[np.lexsort((numbers, rows.encoded.users[candidates]))]
    _, first = np.unique(rows.encoded.users[ordered], return_index=True)
    return np.sort(ordered[first])


def row_number(encoded: Encoded, index: int, step_key: int) -> int:
    """Return 64 bits that follow from a step's key and what one row says, as a number.

    All public randomness of private training comes from here, so a row (or a person) has its own, wherever it
    stands and whoever else is there.
    """
    label = -1 if encoded.labels is None else int(encoded.labels[index])
    start = int(encoded.answer_start[index])
    hasher = hashlib.blake2b(key=step_key.to_bytes(8, "little"), digest_size=8)
    hasher.update(np.array([label, start], dtype="<i8").tobytes())
    hasher.update(encoded.row(index).astype("<i4").tobytes())
    return int.from_bytes(hasher.digest(), "little")
