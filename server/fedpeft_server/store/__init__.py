"""What the daemon keeps: runs, rounds, agents' updates and checkpoints, durable when they count."""

from fedpeft_server.store.rounds import StoredRounds
from fedpeft_server.store.runs import Line, Rules, Runs, Status, StoredRun
from fedpeft_server.store.store import Reference, Store

__all__ = ["Line", "Reference", "Rules", "Runs", "Status", "Store", "StoredRounds", "StoredRun"]
