"""Settings that fit a device: what to change in a run file, in the order of what it costs.

Moves are tried tier by tier: first those that leave the training as it is and take time, then lighter
optimisers, a quantised base, a smaller adapter, and at last training without gradients. In each tier all
allowed moves are made; if that fits, moves are taken back as far as it still does, those of earlier tiers
first, so that what is proposed is no more than is needed. Memory is predicted from shapes: no weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import Any

from fedpeft.config.run_file import build_run
from fedpeft.config.sections import RunConfig, TrainingSection
from fedpeft.data.federated import FederatedData
from fedpeft.errors import FedPEFTError
from fedpeft.planning.memory import Memory
from fedpeft.planning.predict import Predictor
from fedpeft.planning.preflight import problems_of

Changes = Mapping[str, Any]  # dotted key of the run file -> value
LEAST_RANK = 4
FEW_LAYERS = 2


@dataclass(frozen=True)
class Move:
    """One thing to change, further and further.

    Attributes:
        cost: what it costs, in a few words.
        steps: run -> what to set, each step saving more than the one before; empty: nothing to be had.
    """

    cost: str
    steps: Callable[[RunConfig], Sequence[Changes]]


@dataclass(frozen=True)
class Proposal:
    """Settings and what they are predicted to take.

    Attributes:
        tier: how far it goes, in a word or two; "as it is" for the run file itself.
        settings: ``key=value`` as ``--set`` takes them.
        costs: one for each thing that changes.
        memory: predicted.
        total: with the libraries.
        fits: whether that is within the limit.
    """

    tier: str
    settings: tuple[str, ...]
    costs: tuple[str, ...]
    memory: Memory
    total: int
    fits: bool


def _first_order(run: RunConfig) -> bool:
    return run.training.kind == "first-order"


def _micro_batches(run: RunConfig) -> Sequence[Changes]:
    """Smaller pieces that make up the same batch."""
    training = run.training
    if not _first_order(run) or training.fused_update or run.hides_rows:  # private rows go one at a time
        return []
    pieces = [n for n in range(training.batch_size - 1, 0, -1) if training.batch_size % n == 0]
    rows = training.batch_size * training.gradient_accumulation
    keys = ("training.batch_size", "training.gradient_accumulation")
    found: list[Changes] = [dict(zip(keys, (size, rows // size), strict=True)) for size in pieces]
    return found


def _if(holds: Callable[[TrainingSection], bool], changes: Changes) -> Callable[[RunConfig], list[Changes]]:
    def steps(run: RunConfig) -> list[Changes]:
        return [changes] if _first_order(run) and holds(run.training) else []

    return steps


def _optimisers(run: RunConfig) -> list[Changes]:
    if not _first_order(run) or run.training.optimizer not in ("adam", "adamw"):
        return []
    eight = [{"training.optimizer": "adamw8bit"}] if find_spec("bitsandbytes") else []
    return [*eight, {"training.optimizer": "adafactor"}]


def _list_quantised(run: RunConfig) -> list[Changes]:
    if run.model.quantization != "none":
        return []
    kind = "nf4" if find_spec("bitsandbytes") else "rtn4"
    return [{"model.quantization": kind}]


def _ranks(run: RunConfig) -> list[Changes]:
    rank = run.peft.options.get("r", 8)
    found: list[Changes] = []
    while isinstance(rank, int) and rank // 2 >= LEAST_RANK and "r" in run.peft.options:
        rank //= 2
        found.append({"peft.r": rank})
    return found


def _zeroth(run: RunConfig) -> list[Changes]:
    if not _first_order(run):
        return []
    kept = {"batch_size": run.training.batch_size, "steps": run.training.steps, "epochs": run.training.epochs}
    return [{"training": {"kind": "zeroth-order", **{k: v for k, v in kept.items() if v is not None}}}]


TIERS: tuple[tuple[str, tuple[Move, ...]], ...] = (
    (
        "same training, slower",
        (
            Move("same steps in smaller pieces", _micro_batches),
            Move(
                "about a third more computing",
                _if(lambda t: not t.gradient_checkpointing, {"training.gradient_checkpointing": True}),
            ),
            Move(
                "no clipping, no accumulation",
                _if(
                    lambda t: not t.fused_update and t.gradient_accumulation == 1 and t.max_grad_norm is None,
                    {"training.fused_update": True},
                ),
            ),
        ),
    ),
    (
        "lighter optimiser",
        (
            Move("coarser moments", _optimisers),
            Move(
                "a few layers learn at a time",
                _if(lambda t: t.sampled_layers is None, {"training.sampled_layers": FEW_LAYERS}),
            ),
        ),
    ),
    ("quantised base", (Move("a base of 4 bits, other starting loss", _list_quantised),)),
    ("smaller adapter", (Move("less can be learnt", _ranks),)),
    ("no gradients", (Move("many more steps, other learning rate", _zeroth),)),
)


def propose(run: RunConfig, data: FederatedData, limit: int, *, libraries: int) -> list[Proposal]:
    """The run as it is, then the least change of each tier until one fits.

    Args:
        limit: bytes of the device.
        libraries: bytes that Python and the libraries take of them.

    Raises:
        FedPEFTError: the run as it is cannot be predicted.
    """
    search = _Search(run, Predictor(data), limit - libraries)
    own = search.predictor.memory(run)
    fits = own.peak <= search.budget
    found = [Proposal("as it is", (), (), own, own.peak + libraries, fits)]
    for upto, (tier, _) in enumerate(TIERS, start=1):
        if found[-1].fits:
            break
        best = search.best(upto)
        if best is not None:
            settings, costs, memory = best
            total = memory.peak + libraries
            proposal = Proposal(tier, settings, costs, memory, total, memory.peak <= search.budget)
            if proposal.total < min(p.total for p in found) or proposal.fits:
                found.append(proposal)
    return found


@dataclass(frozen=True)
class _Step:
    """One move of one tier, and how far it goes; level 0: it isn't made."""

    tier: int
    move: Move
    steps: tuple[Changes, ...]
    level: int

    @property
    def changes(self) -> Changes:
        return self.steps[self.level - 1] if self.level else {}


class _Search:
    """Which moves, and how far."""

    def __init__(self, run: RunConfig, predictor: Predictor, budget: int) -> None:
        self.run, self.predictor, self.budget = run, predictor, budget

    def best(self, upto: int) -> tuple[tuple[str, ...], tuple[str, ...], Memory] | None:
        """The least change that fits with the moves of so many tiers, else the one that takes least."""
        plan = list(self._all(upto))
        if not any(step.tier == upto for step in plan):
            return None
        memory = self._memory(plan)
        if memory is None:
            return None
        for place in _order_to_take_back(plan, upto):
            plan, memory = self._relax(plan, place, memory)
        made = [step for step in plan if step.level]
        settings = tuple(_setting(key, value) for step in made for key, value in step.changes.items())
        return settings, tuple(step.move.cost for step in made), memory

    def _all(self, upto: int) -> Iterator[_Step]:
        """Every allowed move as far as it goes; one that is refused or saves nothing is left out."""
        made: list[_Step] = []
        before = self.predictor.memory(self.run).peak
        for tier, (_, moves) in enumerate(TIERS[:upto], start=1):
            for move in moves:
                steps = tuple(move.steps(_apply_changes(self.run, made) or self.run))
                for level in range(len(steps), 0, -1):
                    step = _Step(tier, move, steps, level)
                    memory = self._memory([*made, step])
                    if memory is not None and memory.peak < before:
                        made, before = [*made, step], memory.peak
                        break
        yield from made

    def _relax(self, plan: list[_Step], place: int, memory: Memory) -> tuple[list[_Step], Memory]:
        """The plan with one move taken back as far as the rest still fits."""
        for level in range(plan[place].level):
            less = [replace(s, level=level) if n == place else s for n, s in enumerate(plan)]
            found = self._memory(less)
            if found is not None and (found.peak <= self.budget or found.peak == memory.peak):
                return less, found
        return plan, memory

    def _memory(self, plan: list[_Step]) -> Memory | None:
        """What the changed run takes; None if it would be refused."""
        changed = _apply_changes(self.run, plan)
        if changed is None:
            return None
        try:
            return self.predictor.memory(changed)
        except FedPEFTError:
            return None


def _order_to_take_back(plan: list[_Step], upto: int) -> list[int]:
    """Places of a plan: what costs most in what is learnt goes first, the tier's own moves last."""
    others = [n for n, step in enumerate(plan) if step.tier < upto]
    own = [n for n, step in enumerate(plan) if step.tier == upto]
    return [*sorted(others, key=lambda n: -plan[n].tier), *own]


def _apply_changes(run: RunConfig, plan: list[_Step]) -> RunConfig | None:
    """The run with the changes; None if it would be refused for something that it wasn't refused for."""
    settings = [_setting(key, value) for step in plan for key, value in step.changes.items()]
    if not settings:
        return run
    try:
        changed = build_run(run.model_dump(mode="json"), settings, source="fit")
    except FedPEFTError:
        return None
    return changed if set(problems_of(changed)) <= set(problems_of(run)) else None


def _setting(key: str, value: Any) -> str:
    return f"{key}={_toml(value)}"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def proposals_json(found: list[Proposal]) -> list[dict[str, Any]]:
    """Nested tables of plain values, bytes as integers."""
    return [asdict(proposal) for proposal in found]
