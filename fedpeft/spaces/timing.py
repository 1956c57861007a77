"""How long a small piece of work takes, on a machine that others use too."""

import time
from collections.abc import Callable


def least_s(work: Callable[[], object], turns: int = 3) -> float:
    """The shortest of some calls, in seconds; a first one, which may compile, doesn't count."""
    work()
    times = []
    for _ in range(turns):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)
