"""Where work is done: in this process, or in worker processes forked from it.

Forked workers share the pages of whatever the parent loaded before (the base model, the rows). Every worker
computes with one torch thread, so results don't depend on how many there are.
"""

from fedpeft.workers.base import Job, Shared, Workers
from fedpeft.workers.inline import InlineWorkers
from fedpeft.workers.processes import AHEAD, ProcessWorkers, open_workers

__all__ = ["AHEAD", "InlineWorkers", "Job", "ProcessWorkers", "Shared", "Workers", "open_workers"]
