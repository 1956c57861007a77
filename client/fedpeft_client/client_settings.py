"""client.toml and the command line as one frozen value."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from fedpeft.config.sections import DeviceName, Encoding, Quoting, Section, Separator, unit
from fedpeft.config.settings_file import beside, check_table, read_table
from fedpeft.errors import UsageError
from fedpeft.runtime.telemetry import LogFormat, is_address
from fedpeft_client.policy.owner_policy import Policy


class ClientSettings(Section):
    """What an agent is started with."""

    server: str = Field(description="HOST:PORT to dial.")
    data: Path = Field(description="The agent's rows, a file or a folder; they never leave the device.")
    encoding: Encoding | None = Field(
        None,
        description=(
            "Encoding of the rows' text files, such as 'utf-8' or 'windows-1252'. Default: found out from"
            " each file."
        ),
    )
    separator: Separator | None = Field(
        None, description="Sign between the columns of CSV and TSV files. Default: found out from each file."
    )
    quoting: Quoting | None = Field(
        None,
        description=(
            "For CSV and TSV files: 'csv' reads quotation marks as marks around values, 'none' as signs"
            " like others. Default: found out from each file."
        ),
    )
    name: str = Field(
        "",
        description=(
            "The agent's name; with certificates it is the certificate's. Default: the data file's name"
            " without its suffix."
        ),
    )
    keys: Path | None = Field(
        None, description="Folder with the device's key and certificate. Default: keys in home."
    )
    home: Path | None = Field(
        None, description="Folder of state and status. Default: .fedpeft/NAME in the user's home."
    )
    model: str = Field(
        "",
        description=(
            "This device's copy of the base model. Default: the embedded one, or the hub's by the run's name"
            " for it."
        ),
    )
    device: DeviceName = Field(
        "auto",
        description=(
            "What this machine trains on, whatever a run file says: 'auto' (the first CUDA device, else the"
            " CPU), 'cpu', 'cuda' or 'cuda:N'."
        ),
    )
    insecure: bool = Field(False, description="Plaintext, for servers on this very machine.")
    connect_s: Annotated[float, Field(ge=0.0), unit("s")] = Field(
        60.0,
        description=(
            "How long a first contact is tried before the agent gives up; 0: for ever. An agent that was"
            " connected once always goes on trying."
        ),
    )
    idle_release_s: Annotated[float, Field(ge=0.0), unit("s")] = Field(
        0.0, description="The worker, and with it the model, goes after so long without work; 0: never."
    )
    worker_environment: tuple[str, ...] = Field(
        (),
        description=(
            "Names of variables of the environment that the worker gets too, such as 'HF_TOKEN' for a model"
            " that is not everyone's; no other secret of it reaches the worker."
        ),
    )
    metrics: str = Field(
        "",
        description=(
            "HOST:PORT where Prometheus may ask, over plain HTTP and without a login; empty: nowhere."
        ),
    )
    log: LogFormat = Field(
        "text", description="The log on standard error: lines for people, or one JSON object a line."
    )
    policy: Policy = Field(Policy(), description="What the owner allows; a task outside it is refused.")

    @property
    def host(self) -> str:
        """The server's host alone."""
        return self.server.rpartition(":")[0]


def read_settings(config: Path | None, given: Mapping[str, Any]) -> ClientSettings:
    """The file's settings with those given on the command line over them; relative paths are the file's.

    Raises:
        UsageError: every problem, in one line.
    """
    settings = check_table(
        ClientSettings, {**_table(config), **given}, source=str(config or "fedpeft client")
    )
    host, colon, port = settings.server.rpartition(":")
    if not (host and colon and port.isdecimal() and len(port) <= 5 and 0 < int(port) < 65536):
        raise UsageError(f"server {settings.server!r} is no address; give HOST:PORT")
    if settings.metrics and not is_address(settings.metrics):
        raise UsageError(f"metrics {settings.metrics!r} is no address; give HOST:PORT")
    if not settings.data.exists():
        raise UsageError(f"{settings.data}: there is no such file or folder; give --data the agent's rows")
    return settings


def _table(config: Path | None) -> dict[str, Any]:
    table = read_table(config)
    for key in ("data", "keys", "home", "model"):
        value = table.get(key)
        if config is None or not isinstance(value, str) or Path(value).is_absolute():
            continue
        if key != "model" or (config.parent / value).exists():  # else a hub's name
            table[key] = beside(config, value)
    return table
