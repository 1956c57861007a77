"""File descriptors: every connection is one, and a server without any left accepts nobody."""

from __future__ import annotations

import resource

_OTHERS = 256  # database, blobs, logs, libraries


def raise_fd_limit(connections: int) -> str | None:
    """Raise this process's limit of open files as far as it may, to what so many connections need.

    Returns:
        One line for people if that is not enough.
    """
    wanted = connections + _OTHERS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return None
    return (
        f"this process may open {soft} files and {connections} connections need {wanted}; raise LimitNOFILE"
        " of the service (ulimit -n), or lower limits.connections"
    )
