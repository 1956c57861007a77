"""Loading a run on a server whose clients are elsewhere."""

from __future__ import annotations

from fedpeft.attacks import refuse_attack
from fedpeft.config.sections import RunConfig
from fedpeft.data.run_tables import read_test_table
from fedpeft.participant.assembly import assemble, device_for
from fedpeft.participant.loaded_run import LoadedRun


def load_serving_run(run: RunConfig) -> LoadedRun:
    """A run as a server holds it whose clients are elsewhere: no client's rows, only the test set, if any.

    Raises:
        DataError, ModelError, RunFileError: what cannot be read, loaded or attached.
    """
    refuse_attack(run)
    device = device_for(run)
    return assemble(run, read_test_table(run.data, run.model.task), run.model, device)
