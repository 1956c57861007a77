"""The worker's entry: it is confined while it is one thread of the standard library, and then works."""

from __future__ import annotations

import json
import os
import sys

from fedpeft_client.workers.confinement import Allowed, confine, find_gaps


def main(fd: int, allowed: Allowed, *, needs_confinement: bool) -> None:
    """Give up all that `allowed` does not name, say what could not be given up, and serve orders.

    Args:
        needs_confinement: whether orders are refused where anything could not be given up.
    """
    missing = confine(allowed) or find_gaps(allowed)
    for line in missing:
        print(f"fedpeft client: the worker is not fully confined: {line}", file=sys.stderr, flush=True)
    from fedpeft_client.workers import worker  # not before: what it imports starts threads

    worker.main(fd, missing if needs_confinement else ())


if __name__ == "__main__":
    table = json.loads(sys.argv[2])
    allowed = Allowed(tuple(table["readable"]), tuple(table["writable"]), table["network"], table["private"])
    main(int(sys.argv[1]), allowed, needs_confinement=sys.argv[3] == "needs-confinement")
    os._exit(0)  # taking the libraries down in order takes seconds and frees nothing that the end does not
