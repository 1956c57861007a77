"""What happens to an update on its way: pairs of client and server hooks, applied like an onion."""

from fedpeft.stages.base import (
    Stage,
    StageContext,
    derive_payload,
    on_client,
    on_server,
    stage_list,
    stage_traits,
)
from fedpeft.stages.lossy import check_touched
from fedpeft.stages.table import STAGES, build_downlink, build_stages

__all__ = [
    "STAGES",
    "Stage",
    "StageContext",
    "build_downlink",
    "build_stages",
    "check_touched",
    "derive_payload",
    "on_client",
    "on_server",
    "stage_list",
    "stage_traits",
]
