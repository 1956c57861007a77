"""What happens to an update on its way: pairs of a client's hook and a server's hook, applied like an onion."""

from fedpeft.stages.base import Stage, StageContext, on_client, on_server
from fedpeft.stages.table import STAGES, build_stages

__all__ = ["STAGES", "Stage", "StageContext", "build_stages", "on_client", "on_server"]
