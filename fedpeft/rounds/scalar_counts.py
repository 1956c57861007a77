"""How the integers that clients sent in a round are distributed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedpeft.ledger.records import SCALAR_QUANTILES, Scalars
from fedpeft.spaces.seed_modes import AMOUNTS
from fedpeft.updates.update import Arrays

Integers = NDArray[np.int64]


def scalars_in(arrays: Arrays) -> Integers | None:
    """The scalars of an update that are not zero; None where an update holds no such integers."""
    amounts = arrays.get(AMOUNTS)
    if amounts is None or amounts.dtype != np.int64:
        return None
    sent: Integers = amounts[amounts != 0]
    return sent


def scalars_of(parts: Sequence[Integers]) -> Scalars | None:
    """Their distribution over all counted clients; None without any."""
    sent = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    if not sent.size:
        return None
    wide = sent.astype(np.float64)
    bits = np.frexp(np.abs(wide))[1]  # 2^(bits - 1) <= |scalar| < 2^bits
    longest = int(bits.max())
    return Scalars(
        count=sent.size,
        quantiles=tuple(np.quantile(wide, SCALAR_QUANTILES).tolist()),
        negative=tuple(np.bincount(bits[sent < 0], minlength=longest + 1)[1:].tolist()),
        positive=tuple(np.bincount(bits[sent > 0], minlength=longest + 1)[1:].tolist()),
    )
