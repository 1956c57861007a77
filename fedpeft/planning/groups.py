"""What clients that differ from the rest of their run would hold, send and need."""

from __future__ import annotations

from dataclasses import dataclass

from fedpeft.aggregation.lora_rules import rank_of
from fedpeft.config.sections import RunConfig
from fedpeft.errors import FedPEFTError
from fedpeft.planning.loading import Loaded
from fedpeft.planning.predict import Predictor
from fedpeft.planning.traffic import measure_sizes
from fedpeft.spaces import Space
from fedpeft.stages import Stage


@dataclass(frozen=True)
class GroupPlan:
    """One group of clients.

    Attributes:
        clients: how many.
        quantization: of the base that they hold.
        rank: of their LoRA factors; None without LoRA.
        trains: the modules that they train; empty: all.
        down: bytes that one of them is sent in a round.
        up: bytes of its update.
        peak: bytes of memory that its process needs, predicted from shapes; None if that is not possible.
    """

    clients: int
    quantization: str
    rank: int | None
    trains: tuple[str, ...]
    down: int
    up: int
    peak: int | None


def plan_groups(
    run: RunConfig, loaded: Loaded, space: Space, stages: tuple[Stage, ...]
) -> tuple[GroupPlan, ...]:
    """The groups in the order of the run file.

    Raises:
        FedPEFTError: what a stage has against such an update.
    """
    predictor = Predictor(loaded.data)
    plans = []
    for group in run.groups:
        part = run.of_group(group)
        sizes = measure_sizes(run, loaded, space, stages, client=group.clients[0])
        plans.append(
            GroupPlan(
                clients=len(group.clients),
                quantization=part.model.quantization,
                rank=rank_of(part) if "lora" in part.peft.method else None,
                trains=group.trains,
                down=sizes.down,
                up=sizes.up,
                peak=_peak(predictor, part),
            )
        )
    return tuple(plans)


def _peak(predictor: Predictor, part: RunConfig) -> int | None:
    try:
        return predictor.memory(part).peak
    except FedPEFTError:  # it will be said where the group's own problems are
        return None
