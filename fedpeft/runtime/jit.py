"""Compilation by numba: lazily, without the interpreter lock, and cached on disk where that is possible."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

from numba import njit

P = ParamSpec("P")
R = TypeVar("R")


def compile_function(function: Callable[P, R]) -> Callable[P, R]:
    """`function` compiled to machine code at its first call.

    The code is cached beside the source or in the user's cache folder, keyed by processor. Where neither
    can be written (a read-only installation) numba refuses to cache; then each process compiles for itself.
    Floating point keeps IEEE semantics: neither reordering nor contraction is allowed, since bits have to
    be equal.

    The cache looks at the date of the function's own file only: after a change to a compiled function that
    other files call (`numba_signs`), delete `__pycache__/*.nbi`.
    """
    try:
        return cast(Callable[P, R], njit(nogil=True, cache=True, fastmath=False)(function))
    except RuntimeError:
        return cast(Callable[P, R], njit(nogil=True, fastmath=False)(function))
