"""Measure what one record, or one person, moves: the number that epsilon rests on.

Noise of `noise_multiplier` times the bound hides a unit only if the sum that the noise is added to moves by
at most the bound when the unit is added or removed. Here that sum is computed twice, with the noise off,
dropout on and all public randomness as it is: from some of the run's own records, and from the same without
one unit. Both go through what an agent does with its file (explode, filter, templates, the split, tokens) and
through the trainer's own step, with everybody's coin showing heads, at the run's first state and later ones.

A measurement is no proof, which is in the docstrings of `fedpeft.training.dp_sgd` and
`fedpeft.data.heldout`; it is how a proof's mistakes would show.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpeft.config.sections import DataSection, PartitionerSection, RecordLevelPrivacy, RunConfig
from fedpeft.data.federated import FederatedData, encode
from fedpeft.data.labels import plain_value
from fedpeft.data.row_records import RowRecord
from fedpeft.data.tables import RawFederated, client_table
from fedpeft.errors import PrivacyError
from fedpeft.participant.assembly import assemble, trainable_on
from fedpeft.participant.loaded_run import LoadedRun
from fedpeft.privacy.noise_sources import noise_source
from fedpeft.runtime.randomness import stream
from fedpeft.training import private
from fedpeft.updates.update import Arrays

CLIENT = "audit"  # the name under which the records train


@dataclass(frozen=True)
class Measurement:
    """One pair of neighbours at one state.

    Attributes:
        left_out: the record, or the first record of the person, as messages name it.
        records: how many records that unit has.
        round: after how many of the run's own rounds the state was; 0: at its beginning.
        measured: how far the two sums are apart, over `max_grad_norm`.
        bound: how far they may be, likewise: 1 and the rounding to quanta.
    """

    left_out: str
    records: int
    round: int
    measured: float
    bound: float

    @property
    def exceeds(self) -> bool:
        """Whether the noise is too small for what this unit moves."""
        return not self.measured <= self.bound


def draw_records(records: Iterable[RowRecord], count: int, rng: np.random.Generator) -> list[RowRecord]:
    """Return `count` records of a stream, any of them alike, in the stream's order; all if it has no more."""
    kept: list[tuple[int, RowRecord]] = []
    for place, record in enumerate(records):
        if len(kept) < count:
            kept.append((place, record))
        elif (at := int(rng.integers(place + 1))) < count:
            kept[at] = (place, record)
    return [record for _, record in sorted(kept, key=lambda item: item[0])]


def measure_sensitivity(
    run: RunConfig, records: Sequence[RowRecord], *, neighbours: int, seed: int = 0
) -> Iterator[Measurement]:
    """Yield one measurement per unit that is left out, `neighbours` of them; the run trains between two.

    Args:
        run: with record-level privacy.
        seed: of who is left out.

    Raises:
        PrivacyError: the run's privacy is not at record level.
        DataError, ModelError: what cannot be read, loaded or attached.
    """
    if not isinstance(run.privacy, RecordLevelPrivacy):
        raise PrivacyError("sensitivity of records is measured of runs with privacy.kind 'record-level'")
    # Nothing of this is released, and a measurement that repeats itself can be looked into.
    run = run.model_copy(update={"privacy": run.privacy.model_copy(update={"seeded": True})})
    resident = assemble(run, _table(run, records), run.model, trainable_on(run))
    state, rng = resident.initial_state(), stream(seed, "sensitivity")
    units = _units(run.data, records)
    chosen = rng.permutation(len(units))[:neighbours]
    for round_, number in enumerate(chosen):
        unit = units[int(number)]
        fewer = _encode(run, resident, [r for place, r in enumerate(records) if place not in unit])
        resident.space.enter(resident.parameters, state)
        key = int(rng.integers(2**63))
        whole, part = (_sum(resident, data, state, key) for data in (resident.data, fewer))
        told = _make_inputs(resident, resident.data)
        unit_length = math.ldexp(1.0, told.mechanism.exponent) / told.mechanism.max_grad_norm
        yield Measurement(
            left_out=records[min(unit)].where,
            records=len(unit),
            round=round_,
            measured=float(np.linalg.norm((whole - part).astype(np.float64))) * unit_length,
            bound=told.mechanism.sensitivity(len(whole)) * unit_length,
        )
        state = _next_state(resident, round_ + 1, state)


def _units(section: DataSection, records: Sequence[RowRecord]) -> list[frozenset[int]]:
    """The places of each unit's records: single ones, or those of one person."""
    if section.user is None:
        return [frozenset({place}) for place in range(len(records))]
    persons: dict[str, set[int]] = {}
    for place, record in enumerate(records):
        name = str(plain_value(record.fields.get(section.user), section.user, record.where))
        persons.setdefault(name, set()).add(place)
    return [frozenset(places) for places in persons.values()]


def _table(run: RunConfig, records: Sequence[RowRecord]) -> RawFederated:
    """Records as an agent reads them."""
    one = PartitionerSection(kind="iid", clients=1)
    section = run.data.model_copy(update={"test": None, "limit": None, "partitioner": one})
    return client_table(section, records, run.model.task, run.run.seed, CLIENT, hides_rows=True)


def _encode(run: RunConfig, resident: LoadedRun, records: Sequence[RowRecord]) -> FederatedData:
    return encode(_table(run, records), resident.tokenizer, run.data, run.model.task, hides_rows=True)


def _make_inputs(resident: LoadedRun, data: FederatedData) -> private.PrivateTrainingInputs:
    run = resident.run
    if not isinstance(run.privacy, RecordLevelPrivacy):
        raise PrivacyError("a run without record-level privacy has no bound on its rows")
    rows = resident.rows(data.rows, data.clients[0].train)
    rng, source = stream(run.run.seed, "train", CLIENT, 1), noise_source(run, "train", CLIENT, 1)
    return private.PrivateTrainingInputs(rows, run.training, run.privacy, rng, source)


def _sum(resident: LoadedRun, data: FederatedData, state: Arrays, key: int) -> NDArray[np.int64]:
    """The sum of one step, before its noise, at the parameters as they are."""
    told = _make_inputs(resident, data)
    if told.section.kind != "zeroth-order":
        return private.gradient_sum(resident.model, resident.parameters, told, key)
    route = resident.space.route(state, told.section.queries, stream(key, "directions"))
    return private.slope_sum(resident.prober, route.directions.tolist(), told, key)


def _next_state(resident: LoadedRun, round_: int, state: Arrays) -> Arrays:
    """The state after one more round of the one client."""
    update, _ = resident.train_client(0, round_, state, proximal_mu=0.0)
    change = {name: array.astype(np.float64) for name, array in update.arrays.items()}
    return resident.space.apply(state, change)
