"""The one decorator of the compiled kernels."""

from collections.abc import Callable
from typing import TypeVar

import numba

Function = TypeVar("Function", bound=Callable[..., object])


def kernel(function: Function) -> Function:
    """Compile `function` on first call, release the lock while it runs, and keep the result on disk.

    Where no cache folder can be written (a read-only install without a home) each process compiles anew.
    Fast-math stays off: sums have one order, so the same array gives the same bits on every call.
    """
    try:
        compiled: Function = numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:
        compiled = numba.njit(nogil=True)(function)
    return compiled
