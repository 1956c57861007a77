"""The command before anything is loaded: Ctrl-C while libraries are read ends it without a word."""

from __future__ import annotations

import signal


def main() -> None:
    """Load the command line and run it."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from fedpeft.cli import main as run

    signal.signal(signal.SIGINT, before)
    run()


if __name__ == "__main__":
    main()
