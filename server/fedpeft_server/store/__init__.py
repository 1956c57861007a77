"""What the daemon keeps: runs, rounds, agents' updates and checkpoints, durable when they count."""

from fedpeft_server.store.rounds import StoredRounds
from fedpeft_server.store.run_log import Line, say
from fedpeft_server.store.runs import Runs
from fedpeft_server.store.store import Reference, Store
from fedpeft_server.store.stored_run import EVERYONE, Rules, RunStatus, StoredRun
from fedpeft_server.store.submitter_usage import Quota

__all__ = [
    "EVERYONE",
    "Line",
    "Quota",
    "Reference",
    "Rules",
    "RunStatus",
    "Runs",
    "Store",
    "StoredRounds",
    "StoredRun",
    "say",
]
