"""Loading a run on one device: its owner's rows, and nothing that the run file says about sources."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedpeft.attacks import refuse_attack
from fedpeft.config.sections import RunConfig
from fedpeft.data.tables import read_client_table
from fedpeft.models.device import device_named
from fedpeft.participant.assembly import Admit, assemble, refuse_device
from fedpeft.participant.loaded_run import LoadedRun
from fedpeft.privacy.noise_sources import refuse_seeded

LOG = logging.getLogger("fedpeft.client")


@dataclass(frozen=True)
class Own:
    """What a device brings to a run that others describe.

    Attributes:
        client: its name in the run.
        data: its file or folder of rows; the run's own sources and partitioner play no part.
        model: where its copy of the base model lies; empty: the embedded one, or the hub's by its name.
        device: what it computes on, whatever the run file says.
        encoding, separator, quoting: how its text files are written, as in a run file's `data`; None: found
            out for each file.
    """

    client: str
    data: Path
    model: str = ""
    device: str = "cpu"
    encoding: str | None = None
    separator: str | None = None
    quoting: Literal["csv", "none"] | None = None


def load_own_resident(
    run: RunConfig, own: Own, *, admit: Admit | None = None, start_bytes: bytes = b""
) -> LoadedRun:
    """A run as one device takes part in it: one client, with its own rows.

    The client has the rows, the split and the weight that it has in a simulation in which its file is one of
    several, under the same name.

    Raises:
        DataError, ModelError, RunFileError: what cannot be read, loaded or attached.
        PrivacyError: the run's noise is no secret.
    """
    refuse_seeded(run)
    refuse_attack(run)
    part = run.of_client(own.client)
    device = device_named(own.device)
    refuse_device(part, device)
    files = {"encoding": own.encoding, "separator": own.separator, "quoting": own.quoting}
    data = run.data.model_copy(update=files)
    raw = read_client_table(
        data, own.data, run.model.task, run.run.seed, own.client, hides_rows=run.hides_rows
    )
    if raw.bad_rows:  # said here and nowhere else: the server must not know
        LOG.warning("%d rows cannot be used with the run's fields and labels and are left out", raw.bad_rows)
    section = part.model.model_copy(update={"path": own.model}) if own.model else part.model
    return assemble(run, raw, section, device, admit, part.peft, start_bytes)
