"""From one client's reply to its outcome: checked, its stages undone, folded in; and the tasks it answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Message, RecordDict
from numpy.typing import NDArray

from fedpeft.config.sections import LocalPrivacy, RecordLevelPrivacy
from fedpeft.errors import FedPEFTError, UpdateError
from fedpeft.ledger.records import ClientOutcome
from fedpeft.rounds.private_rounds import RoundPrivacy
from fedpeft.rounds.round_context import RoundContext
from fedpeft.rounds.scalar_counts import scalars_in
from fedpeft.rounds.strategies import Aggregator
from fedpeft.rounds.strategy_table import proximal_mu
from fedpeft.rounds.traffic_stats import header_bytes
from fedpeft.stages import StageContext, derive_payload, on_server
from fedpeft.transport.tasks import Task, read_update, task_content
from fedpeft.updates.update import Arrays, Layout, Update
from fedpeft.wire.codec import Envelope, decode


@dataclass
class RoundReplies:
    """A round's outcomes so far, from the state that it began with."""

    state: Arrays
    outcomes: list[ClientOutcome] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)  # weight, loss
    errors: list[FedPEFTError] = field(default_factory=list)
    scalars: list[NDArray[np.int64]] = field(default_factory=list)  # of each counted client
    header: int = 0  # bytes of an update's message without values

    @property
    def folded(self) -> int:
        """Updates that count."""
        return sum(outcome.status == "folded" for outcome in self.outcomes)

    @property
    def train_loss(self) -> float | None:
        """Mean of the clients' losses, weighted as their updates are."""
        total = sum(weight for weight, _ in self.losses)
        return math.fsum(weight * loss for weight, loss in self.losses) / total if total else None


@dataclass(frozen=True)
class TaskRequest:
    """What one client was asked.

    Attributes:
        round: its task's; the state is that of the round before.
        state_digest: the state's fingerprint.
        bytes_down: of the message that brought it.
        layout: of its update; None: that of the aggregator.
    """

    client: str
    round: int
    state_digest: str
    bytes_down: int
    layout: Layout | None = None


def task_contents(
    federation: RoundContext, number: int, payloads: Mapping[str, bytes]
) -> dict[str, RecordDict]:
    """Each client's task; clients that are sent the same share one object.

    Args:
        number: the tasks' round.
        payloads: the state for each client, as bytes.
    """
    made: dict[int, RecordDict] = {}  # by identity: to hash a payload is to read it all
    for payload in payloads.values():
        if id(payload) not in made:
            made[id(payload)] = task_content(
                Task(
                    run_digest=federation.task_digest,
                    round=number,
                    state=payload,
                    run_json=federation.run_json,
                    device_task=federation.device_task,
                    proximal_mu=proximal_mu(federation.run.federation.strategy),
                )
            )
    return {name: made[id(payload)] for name, payload in payloads.items()}


def note(
    federation: RoundContext, privacy: RoundPrivacy, collected: RoundReplies, outcome: ClientOutcome
) -> None:
    """Keep an outcome, and show of it what may be shown."""
    collected.outcomes.append(outcome)
    shown = privacy.filter_outcome(outcome)
    if shown is not None:
        federation.observer.client_done(shown)


def process_reply(
    federation: RoundContext,
    aggregator: Aggregator,
    reply: Message,
    asked: TaskRequest,
    collected: RoundReplies,
) -> ClientOutcome:
    """Check one reply, undo its stages, fold it in. Whatever is wrong with it stays with its sender."""
    payload = b""
    try:
        payload = read_update(reply)
        envelope = _decode_checked(federation, payload, asked, aggregator)
        collected.header = collected.header or header_bytes(envelope)
        context = StageContext(federation.run.run.seed, asked.round, asked.client)
        metrics = {key: value for key, value in envelope.metrics.items() if math.isfinite(value)}
        came = Update(envelope.arrays, envelope.weight, metrics, envelope.encoded)
        update = on_server(federation.stages, came, context)
        federation.space.check(update.arrays, state=collected.state, who=asked.client)
        norm = aggregator.fold(asked.client, update)
    except FedPEFTError as error:
        collected.errors.append(error)
        return ClientOutcome(
            client=asked.client,
            status="refused" if payload else "failed",
            reason=str(error),
            bytes_up=len(payload),
            bytes_down=asked.bytes_down,
        )
    sent = scalars_in(update.arrays)
    if sent is not None:
        collected.scalars.append(sent)
    if "loss" in metrics:
        collected.losses.append((update.weight, metrics["loss"]))
    return ClientOutcome(
        client=asked.client,
        status="folded",
        examples=int(metrics.get("examples", 0)),
        steps=int(metrics.get("steps", 0)),
        loss=metrics.get("loss"),
        bytes_up=len(payload),
        bytes_down=asked.bytes_down,
        update_norm=norm,
        distortion=metrics.get("distortion"),
        cosine=metrics.get("cosine"),
        rank=int(metrics["rank"]) if "rank" in metrics else None,
    )


def _decode_checked(
    federation: RoundContext, payload: bytes, asked: TaskRequest, aggregator: Aggregator
) -> Envelope:
    """Decode an update and refuse one that is not this client's answer to its task."""
    name = asked.client
    promised = derive_payload(federation.stages)
    layout = aggregator.layout if asked.layout is None else asked.layout
    envelope = decode(payload, who=name, layout=layout, expect=promised)
    expected = {
        "run": (envelope.run_digest, federation.task_digest),
        "round": (envelope.round, asked.round),
        "client": (envelope.client, name),
        "state": (envelope.state_digest, asked.state_digest),
        "space": (envelope.space, federation.space.kind),
        "base model": (envelope.base_digest, federation.roster.base_of(name)),
        "stages": (envelope.stages, federation.stage_list),
    }
    for what, (came, wanted) in expected.items():
        if came != wanted:
            raise UpdateError(
                f"{name}: an update of {what} {str(came)[:20]!r} came, {str(wanted)[:20]!r} was asked for"
            )
    _refuse_weight(federation, envelope)
    return envelope


def _refuse_weight(federation: RoundContext, envelope: Envelope) -> None:
    """Refuse an update that counts for more rows than its client said at the roll call.

    Where all weights are one, a device may keep the number to itself, and says 0.
    """
    name, run = envelope.client, federation.run
    hidden = isinstance(run.privacy, RecordLevelPrivacy | LocalPrivacy)
    counts_alike = hidden or run.federation.weighting == "uniform"
    said = 1 if counts_alike else federation.roster.members[name].examples
    if envelope.weight > said:
        raise UpdateError(
            f"{name}: an update of weight {envelope.weight} came; its answer to the roll call allows {said}:"
            " were its rows changed in the middle of the run?"
        )
