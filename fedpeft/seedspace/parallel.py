"""Work over disjoint ranges on several threads; compiled kernels hold no interpreter lock."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def over_ranges(work: Callable[[int, int], T], count: int, threads: int) -> list[T]:
    """Results of `work(first, last)` on at most `threads` contiguous ranges that cover `count` items.

    How the items are cut never shows in a result: the ranges write to disjoint places or return integers.
    """
    workers = max(1, min(threads, count))
    edges = [count * index // workers for index in range(workers + 1)]
    if workers == 1:
        return [work(0, count)]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, edges[:-1], edges[1:]))
