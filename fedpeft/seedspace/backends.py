"""Which implementation of the kernels serves: one literal table, one choice by device."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol, TypeAlias

import torch

from fedpeft.errors import MissingExtraError, TrainingError
from fedpeft.seedspace.layout import CounterStream, Span


class Accumulate(Protocol):
    """sum_k amounts[k] * z_k over a span."""

    def __call__(
        self,
        stream: CounterStream,
        span: Span,
        directions: torch.Tensor,
        amounts: torch.Tensor,
        device: torch.device,
        threads: int,
    ) -> torch.Tensor:
        """int64 [span.size] on `device`."""


class Project(Protocol):
    """<delta, z_k> for every direction."""

    def __call__(
        self, stream: CounterStream, span: Span, directions: torch.Tensor, delta: torch.Tensor, threads: int
    ) -> torch.Tensor:
        """int64 [K] on the CPU, from int64 [span.size] `delta` on any device."""


class Perturb(Protocol):
    """Weights plus a scaled direction."""

    def __call__(
        self,
        stream: CounterStream,
        tensor_id: int,
        direction: int,
        source: torch.Tensor,
        starts: torch.Tensor,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """Writes source + scale * z to `out`, [pieces, length] each; piece p begins at starts[p]."""


Shift: TypeAlias = Callable[[int, float, torch.Tensor], None]
"""(direction, scale, out): writes certain weights plus scale * z to `out`, of their shape and dtype."""


class Prepare(Protocol):
    """Perturbs the same weights again and again."""

    def __call__(self, stream: CounterStream, tensor_id: int, source: torch.Tensor, start: int) -> Shift:
        """For contiguous float32 or float64 `source`, whose first element is coordinate `start`."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """One backend's three kernels; all backends return the same bits.

    `prepare` is there where a call of `perturb` costs more than what a small layer's weights take.
    """

    name: str
    accumulate: Accumulate
    project: Project
    perturb: Perturb
    prepare: Prepare | None = None


# Backend: the package it needs, the device types it serves in order of preference, its module.
_TABLE = {
    "numba": ("numba", ("cpu",), "fedpeft.seedspace.numba_kernels"),
    "triton": ("triton", ("cuda",), "fedpeft.seedspace.triton_kernels"),
    "torch": ("torch", ("cpu", "cuda"), "fedpeft.seedspace.torch_kernels"),
}
BACKENDS = tuple(_TABLE)


@cache
def kernels_for(device: torch.device, backend: str | None = None) -> Kernels:
    """The named backend, or the fastest one that is installed for the device.

    Raises: TrainingError for an unknown name or a device it doesn't serve; MissingExtraError where its
    package is not installed.
    """
    if backend is None:
        fitting = (
            name for name, (package, _, _) in _TABLE.items() if _serves(name, device) and _has(package)
        )
        return _load(next(fitting, "torch"))
    if backend not in _TABLE:
        raise TrainingError(f"unknown seed-space backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    package = _TABLE[backend][0]
    if not _serves(backend, device):
        raise TrainingError(f"backend {backend!r} doesn't serve {device.type} tensors: leave the backend out")
    if not _has(package):
        raise MissingExtraError(f"backend {backend!r} needs the package {package}: pip install {package}")
    return _load(backend)


def _serves(backend: str, device: torch.device) -> bool:
    return backend == "torch" or device.type in _TABLE[backend][1]


@cache
def _has(package: str) -> bool:
    return find_spec(package) is not None


@cache
def _load(backend: str) -> Kernels:
    module = import_module(_TABLE[backend][2])
    prepare = getattr(module, "prepare", None)
    return Kernels(backend, module.accumulate, module.project, module.perturb, prepare)
