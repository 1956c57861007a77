"""The worker's entry: it is confined while it is one thread of the standard library, and then works."""

from __future__ import annotations

import json
import os
import sys

from fedpeft_client.workers.confinement import Allowed, confine


def main(fd: int, allowed: Allowed) -> None:
    """Give up all that `allowed` does not name, say what could not be given up, and serve orders."""
    for line in confine(allowed):
        print(f"fedpeft client: the worker is not fully confined: {line}", file=sys.stderr, flush=True)
    from fedpeft_client.workers import worker  # not before: what it imports starts threads

    worker.main(fd)


if __name__ == "__main__":
    table = json.loads(sys.argv[2])
    main(int(sys.argv[1]), Allowed(tuple(table["readable"]), tuple(table["writable"]), table["network"]))
    os._exit(0)  # taking the libraries down in order takes seconds and frees nothing that the end does not
