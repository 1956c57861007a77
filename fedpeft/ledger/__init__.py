"""The durable record of a run."""

from fedpeft.ledger.checkpoint import Checkpoint
from fedpeft.ledger.run_folder import RunFolder

__all__ = ["Checkpoint", "RunFolder"]
