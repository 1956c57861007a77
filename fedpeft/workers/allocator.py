"""What the C library does with freed memory: keeps it, where whole updates come and go with every client."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's numbers for them
_KEPT_BYTES = 64 << 20  # free memory at the heap's end that isn't given back
_LARGE_BYTES = 4 << 20  # blocks from this size on are mapped by themselves, and given back when freed


def keep_freed_memory() -> None:
    """Keep a little freed memory instead of giving it back to the system after every client.

    By default glibc returns an adapter's bytes as soon as they are freed and is handed fresh, zeroed pages
    for the next: a third of what a small task costs. It also learns to keep ever larger blocks in its heap,
    which splinters; the fixed limit ends that. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)
