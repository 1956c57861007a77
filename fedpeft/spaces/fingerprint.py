"""A fingerprint of weights as integers, so that it travels with the state that stands for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedpeft.errors import ModelError
from fedpeft.seedspace.digest import digest


def fingerprint(weights: Mapping[str, torch.Tensor]) -> NDArray[np.int64]:
    """int64 [8]: SHA-256 over names, dtypes, shapes and bits of the weights."""
    return np.frombuffer(bytes.fromhex(digest(weights)), dtype=">u4").astype(np.int64)


def refuse_other_weights(weights: Mapping[str, torch.Tensor], announced: NDArray[Any]) -> None:
    """Compare weights with the fingerprint that a state announces.

    Raises:
        ModelError: they differ.
    """
    own = fingerprint(weights)
    if not np.array_equal(own, announced):
        raise ModelError(
            f"these weights have fingerprint {_hex(own)[:12]} and the state's is {_hex(announced)[:12]}; base"
            " model, adapter or versions differ from the server's, so nothing was trained"
        )


def _hex(words: NDArray[Any]) -> str:
    return "".join(f"{int(word) & 0xFFFFFFFF:08x}" for word in words)
