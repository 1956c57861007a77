"""Loading a run with the rows of all its clients, by the sources that its run file names.

Whoever calls this reads whatever files the run file names, so the run file must be one's own. An agent never
gets here: see `fedpeft.participant.load_device`.
"""

from __future__ import annotations

from dataclasses import replace

from fedpeft.attacks import attackers_of, hostile_clients
from fedpeft.config.client_groups import refuse_unknown
from fedpeft.config.sections import DataSection, RunConfig
from fedpeft.data.run_tables import read_tables
from fedpeft.participant.assembly import Admit, LoadedModel, assemble, load_body, trainable_on
from fedpeft.participant.loaded_run import LoadedRun


def load_simulated_run(
    run: RunConfig,
    *,
    admit: Admit | None = None,
    start_bytes: bytes = b"",
    data: DataSection | None = None,
) -> LoadedRun:
    """Read the rows, load the base model, attach the adapter.

    Args:
        data: the run's data section with the places where its rows lie now; None: they lie where it says.
        start_bytes: `LoadedRun.start_bytes` of who has loaded the run before; empty: nobody's is known.

    Raises:
        DataError, ModelError, RunFileError: what cannot be read, loaded or attached.
    """
    device = trainable_on(run)
    raw = read_tables(data or run.data, run.model.task, run.run.seed, hides_rows=run.hides_rows)
    names = {client.name for client in raw.clients}
    refuse_unknown(run, names)
    attackers_of(run, names)
    resident = assemble(run, raw, run.model, device, admit, start_bytes=start_bytes)
    rows = resident.data
    resident.hostile = hostile_clients(run, rows.clients, rows.rows, rows.num_labels)
    resident.own = _of_groups(resident)
    return resident


def _of_groups(whole: LoadedRun) -> dict[int, LoadedRun]:
    """The run as each group holds it that has a model of its own; groups with equal models share it."""
    bodies: dict[str, LoadedModel] = {}
    own = {}
    for place, group in enumerate(whole.run.groups):
        if group.own_model:
            part = whole.run.of_group(group)
            key = part.model.model_dump_json() + part.peft.model_dump_json()
            if key not in bodies:
                labels = whole.data.num_labels
                bodies[key] = load_body(
                    whole.run, part.model, part.peft, whole.tokenizer, labels, whole.device
                )
            body = bodies[key]
            own[place] = replace(
                whole,
                model=body.model,
                space=body.space,
                base_digest=body.digest,
                directions=body.directions,
                group_directions=body.group_directions,
                own={},
            )
    return own
