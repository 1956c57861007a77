"""What each stage must give, written as plainly as can be: no code of the stages or of the codec."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
FALSE_ALARM = 1e-9  # of the one check of chance below


def kept(size: int, density: float) -> int:
    return 0 if size == 0 else min(size, max(1, math.floor(density * size + 0.5)))


def largest(x: Array, density: float) -> list[int]:
    flat = x.ravel()
    order = sorted(range(flat.size), key=lambda i: (-abs(flat[i]), i))
    return order[: kept(flat.size, density)]


def check_equal(x: Array, out: Array, options: Mapping[str, Any]) -> None:
    assert np.array_equal(x, out)


def check_top_k(x: Array, out: Array, options: Mapping[str, Any]) -> None:
    wanted = np.zeros(x.size)
    for i in largest(x, options["density"]):
        wanted[i] = x.ravel()[i]
    assert np.array_equal(out.ravel(), wanted)


def check_ternary(x: Array, out: Array, options: Mapping[str, Any]) -> None:
    flat, places = x.ravel(), largest(x, options["density"])
    if not places:
        return
    scale = options.get("value", sum(abs(flat[i]) for i in places) / len(places))
    wanted = np.zeros(x.size)
    for i in places:
        wanted[i] = math.copysign(scale, flat[i])
    assert np.allclose(out.ravel(), wanted, rtol=1e-6, atol=0)


def check_random_k(x: Array, out: Array, options: Mapping[str, Any]) -> None:
    places = np.flatnonzero(out)
    count = kept(x.size, options["density"])
    assert places.size == count
    if count:
        gain = 1.0 if options.get("error_feedback") else x.size / count
        assert np.allclose(out.ravel()[places], gain * x.ravel()[places], rtol=1e-6, atol=0)


def check_dare(x: Array, out: Array, options: Mapping[str, Any]) -> None:
    places, keep = np.flatnonzero(out), 1 - options["drop_rate"]
    assert np.allclose(out.ravel()[places], x.ravel()[places] / keep, rtol=1e-6, atol=0)
    slack = math.sqrt(x.size * math.log(2 / FALSE_ALARM) / 2)  # Hoeffding
    assert abs(places.size - keep * x.size) <= slack


def check_quantise(x: Array, out: Array, options: Mapping[str, Any]) -> None:
    if not x.size:
        return
    levels = 2 ** (options["bits"] - 1) - 1
    axis = None if x.ndim < 2 else int(np.argmin(x.shape))
    others = tuple(i for i in range(x.ndim) if i != axis)
    step = np.abs(x).max(axis=others, keepdims=True) / levels
    assert np.all(np.abs(out - x) <= step * (1 + 1e-5))
    codes = out / np.where(step > 0, step, 1)
    assert np.allclose(codes, np.rint(codes), atol=1e-4)


def check_sign(x: Array, out: Array, options: Mapping[str, Any]) -> None:
    if x.size:
        scale = sum(abs(v) for v in x.ravel()) / x.size
        assert np.allclose(out, np.where(x < 0, -scale, scale), rtol=1e-6, atol=0)


Check = Callable[[Array, Array, Mapping[str, Any]], None]
CHECKS: Mapping[str, Check] = {
    "dare": check_dare,
    "identity": check_equal,
    "quantise": check_quantise,
    "random-k": check_random_k,
    "sign": check_sign,
    "ternary": check_ternary,
    "top-k": check_top_k,
    "weigh": check_equal,
}
