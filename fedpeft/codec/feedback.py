"""Error feedback: what a lossy compressor left behind is added to the next round's delta.

Source: Seide et al. (2014) and Karimireddy et al. (2019): p = delta + e, send C(p), e <- p - C(p). Both
functions are pure; the caller keeps the residuals, one set per client (or one for the server's downlink).
They carry past data into later rounds, so they fit neither stateless clients nor record-level privacy
accounting.
"""

from collections.abc import Mapping

import numpy as np

from fedpeft.codec.arrays import Float32Array
from fedpeft.codec.tensors import EncodedTensor
from fedpeft.errors import UpdateError

Deltas = Mapping[str, Float32Array]


def with_residual(deltas: Deltas, residuals: Deltas) -> dict[str, Float32Array]:
    """Deltas + residuals, entry by entry in float32; an empty `residuals` is the first round.

    Raises:
        UpdateError: residuals of other tensors or shapes than the deltas.
    """
    if residuals and residuals.keys() != deltas.keys():
        odd = sorted(residuals.keys() ^ deltas.keys())[0]
        raise UpdateError(
            f"error feedback: tensor {odd!r} has a delta or a residual but not both, reset the memory"
        )
    corrected = {}
    for name, delta in deltas.items():
        residual = residuals.get(name)
        if residual is not None and residual.shape != delta.shape:
            raise UpdateError(
                f"error feedback: residual {residual.shape} for {name!r} with shape {delta.shape}"
            )
        corrected[name] = delta.copy() if residual is None else np.add(delta, residual, dtype=np.float32)
    return corrected


def residual_after(corrected: Deltas, sent: Mapping[str, EncodedTensor]) -> dict[str, Float32Array]:
    """Corrected - dense(sent), the memory for the next round; a tensor that was not sent stays whole in it.

    Raises:
        UpdateError: something was sent that `corrected` does not hold, or in another shape.
    """
    left = {name: delta.copy() for name, delta in corrected.items()}
    for name, encoded in sent.items():
        if name not in left or left[name].shape != encoded.shape:
            raise UpdateError(
                f"error feedback: {name!r} with shape {encoded.shape} was sent but not compressed here"
            )
        left[name] -= encoded.dense()
    return left
