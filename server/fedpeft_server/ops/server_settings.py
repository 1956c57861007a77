"""server.toml and the command line as one frozen value."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from fedpeft.config.sections import Count, Section, unit
from fedpeft.config.settings_file import beside, check_table, read_table
from fedpeft.data.hub import PREFIX
from fedpeft.errors import UsageError
from fedpeft.runtime.telemetry import LogFormat, LogLevel, is_address
from fedpeft_server.runs.roots import Roots
from fedpeft_server.store import Quota
from fedpeft_server.transport.grpc_options import TransportOptions
from fedpeft_server.transport.serving import is_loopback

Seconds = Annotated[float, Field(gt=0.0)]
Rate = Annotated[float, Field(gt=0.0)]
DEFAULT_PORT = 9440


class TlsSection(Section):
    """Certificates, as `fedpeft provision` makes them."""

    keys: Path | None = Field(
        None,
        description=(
            "Folder with the server's key and certificate. Default: none; give it, or start with --insecure."
        ),
    )
    authority: Path | None = Field(
        None,
        description="Folder of the authority. Default: none; devices enrol and renew elsewhere then.",
    )


class LimitsSection(Section):
    """What agents and people may use of this machine.

    `TransportOptions` has the reasons of the defaults.
    """

    agents: Annotated[Count, unit("agents")] = Field(4096, description="Connected at a time.")
    connections: Annotated[Count, unit("connections")] = Field(
        8192,
        description="Of agents and people, with a call or without; must fit into the limit of open files.",
    )
    streams: Annotated[Count, unit("calls")] = Field(
        16, description="Open calls of one caller, over all its connections."
    )
    calls_per_s: Annotated[Rate, unit("calls/s")] = Field(
        20.0, description="Calls of one caller; ten seconds' worth may come at once."
    )
    messages_per_s: Annotated[Rate, unit("messages/s")] = Field(
        100.0, description="Messages in one agent's session; ten seconds' worth may come at once."
    )
    sessions_per_minute: Annotated[Count, unit("sessions/min")] = Field(
        60, description="Sessions that one agent may begin."
    )
    agent_mib_per_hour: Annotated[Count, unit("MiB/h")] = Field(
        32_768, description="Updates and models of one agent, both ways together."
    )
    refusals_per_hour: Annotated[Count, unit("refusals/h")] = Field(
        60, description="Refusals of what only a hostile or broken caller sends; then it has to wait."
    )
    blob_mib: Annotated[Count, unit("MiB")] = Field(4096, description="Largest update.")
    uploads: Annotated[Count, unit("uploads")] = Field(
        4, description="Large updates that come in at a time; the others wait, so that memory stays bounded."
    )
    downloads: Annotated[Count, unit("downloads")] = Field(
        16, description="Large files that go out at a time; the others wait."
    )
    heartbeat_s: Annotated[float, Field(ge=0.1, le=3600.0), unit("s")] = Field(
        15.0, description="Agents say something at least as often."
    )
    stall_s: Annotated[Seconds, unit("s")] = Field(
        30.0, description="A peer that stands still for so long in the middle of an upload loses its turn."
    )
    turn_s: Annotated[Seconds, unit("s")] = Field(
        60.0,
        description=(
            "A large update's turn lasts so long while others wait; at its next turn it goes on where it was."
        ),
    )
    submitter_runs: Annotated[Count, unit("runs")] = Field(
        16, description="Runs of one submitter that have not ended."
    )
    submitter_rounds: Annotated[Count, unit("rounds")] = Field(
        50_000, description="Rounds of these runs together."
    )
    submitter_gib: Annotated[Count, unit("GiB")] = Field(
        64, description="What all runs of one submitter keep on the disk, ended ones too."
    )
    away_s: Annotated[Seconds, unit("s")] = Field(
        600.0,
        description=(
            "Members that are away for longer are left out of a round without federation.deadline_s once the"
            " others have answered."
        ),
    )
    model_task_s: Annotated[Seconds, unit("s")] = Field(
        7200.0, description="A model's process that takes longer to load, evaluate or export is ended."
    )
    check_s: Annotated[Seconds, unit("s")] = Field(
        300.0, description="A submitted run file whose check takes longer is refused."
    )
    round_s: Annotated[Seconds, unit("s")] = Field(
        21_600.0, description="For a round's last answers, where the run file sets no federation.deadline_s."
    )


class LogSection(Section):
    """How the daemon's own log is written, on standard error; each run has a log of its own."""

    format: LogFormat = Field("text", description="Lines for people, or one JSON object a line.")
    level: LogLevel = Field("info", description="The least severe messages that are written.")


class MetricsSection(Section):
    """Numbers for Prometheus, over plain HTTP and without a login: whoever reaches the address reads them."""

    address: str = Field("", description="HOST:PORT where they are served; empty: nowhere.")


class ServerSettings(Section):
    """What a server is started with."""

    listen: str = Field(
        f"127.0.0.1:{DEFAULT_PORT}",
        description="HOST:PORT for agents and people alike; port 0 takes a free one.",
    )
    state: Path = Field(
        Path("fedpeft-state"), description="Folder of everything that outlives the daemon; back it up."
    )
    database: str = Field(
        "",
        description=(
            "An SQLAlchemy URL such as 'postgresql+psycopg://USER@HOST/NAME'; empty: an SQLite file in state."
        ),
    )
    parallel_runs: Annotated[Count, unit("runs")] = Field(
        1, description="Runs that are executed at a time; the others are queued."
    )
    insecure: bool = Field(False, description="Plaintext, for agents on this very machine.")
    roots: tuple[str, ...] = Field(
        (),
        description=(
            "Folders below which submitters' run files may name files (data.test, model.path,"
            " evaluation.plug_into), and data sets as 'datasets:OWNER/NAME'; empty: they name none."
        ),
    )
    drain_s: Annotated[Seconds, unit("s")] = Field(
        30.0, description="What runs get to reach a safe point when the daemon is told to end."
    )
    model_s: Annotated[float, Field(ge=0.0), unit("s")] = Field(
        60.0,
        description=(
            "How long the process that holds a model stays when nothing is to be evaluated or exported;"
            " 0: the daemon holds models itself."
        ),
    )
    model_environment: tuple[str, ...] = Field(
        (),
        description=(
            "Names of variables of the environment that processes which hold models get too, such as"
            " 'HF_TOKEN'; no other secret of it reaches them."
        ),
    )
    tls: TlsSection = Field(TlsSection(), description="Certificates.")
    limits: LimitsSection = Field(
        LimitsSection(), description="What agents and people may use of this machine."
    )
    log: LogSection = Field(LogSection(), description="How the daemon's own log is written.")
    metrics: MetricsSection = Field(MetricsSection(), description="Numbers for Prometheus.")

    @property
    def host(self) -> str:
        """Of the address alone."""
        return self.listen.rpartition(":")[0]

    def transport(self) -> TransportOptions:
        """As the transport takes it."""
        return TransportOptions(
            host=self.host,
            port=int(self.listen.rpartition(":")[2]),
            max_blob_bytes=self.limits.blob_mib << 20,
            upload_credits=self.limits.uploads,
            download_credits=self.limits.downloads,
            heartbeat_s=self.limits.heartbeat_s,
            stall_s=self.limits.stall_s,
            turn_s=self.limits.turn_s,
            max_sessions=self.limits.agents,
            max_connections=self.limits.connections,
            max_streams=self.limits.streams,
            calls_per_s=self.limits.calls_per_s,
            messages_per_s=self.limits.messages_per_s,
            sessions_per_minute=self.limits.sessions_per_minute,
            bytes_per_hour=self.limits.agent_mib_per_hour << 20,
            refusals_per_hour=self.limits.refusals_per_hour,
        )

    def submitter_roots(self) -> Roots:
        """What submitters' run files may name on this machine."""
        return Roots(self.roots)

    def quota(self) -> Quota:
        """What each submitter may hold."""
        limits = self.limits
        return Quota(limits.submitter_runs, limits.submitter_rounds, limits.submitter_gib << 30)


def read_settings(config: Path | None, given: Mapping[str, Any]) -> ServerSettings:
    """The file's settings with those given on the command line over them; relative paths are the file's.

    Args:
        given: nested as the file is; None stands for what wasn't given.

    Raises:
        UsageError: every problem, in one line.
    """
    where = str(config or "fedpeft server")
    settings = with_given(config, given)
    host, colon, port = settings.listen.rpartition(":")
    if not (host and colon and port.isdecimal() and int(port) < 65536):
        raise UsageError(f"{where}: listen is {settings.listen!r}; give HOST:PORT")
    if settings.metrics.address and not is_address(settings.metrics.address):
        raise UsageError(f"{where}: metrics.address is {settings.metrics.address!r}; give HOST:PORT")
    if settings.insecure and not is_loopback(settings.host):
        raise UsageError(
            f"{where}: {settings.host} can be reached from elsewhere and would be plaintext; provision"
            " certificates (fedpeft provision), or listen on 127.0.0.1"
        )
    _refuse_roots_over_secrets(settings, where)
    if settings.insecure == (settings.tls.keys is not None):
        raise UsageError(
            f"{where}: give either --keys DIR, the server folder that fedpeft provision made, or --insecure"
            " on 127.0.0.1"
        )
    return settings


def _refuse_roots_over_secrets(settings: ServerSettings, where: str) -> None:
    """Refuse roots from which a run file could name what is the server's own.

    Raises:
        UsageError: naming the root and the folder.
    """
    own = {"state": settings.state, "tls.keys": settings.tls.keys, "tls.authority": settings.tls.authority}
    folders = {key: folder.expanduser().resolve() for key, folder in own.items() if folder is not None}
    for root in settings.roots:
        if root.startswith(PREFIX):
            continue
        place = Path(root).expanduser().resolve()
        for key, folder in folders.items():
            if folder.is_relative_to(place) or place.is_relative_to(folder):
                raise UsageError(
                    f"{where}: roots names '{root}', and {key} is {folder}: submitters could have the"
                    " server's own files read; name folders that hold data and models alone"
                )


def with_given(config: Path | None, given: Mapping[str, Any]) -> ServerSettings:
    """As `read_settings`, for commands beside a server's: whether a server could start so is not asked."""
    return check_table(ServerSettings, _over(_table(config), given), source=str(config or "fedpeft server"))


def _over(table: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(table)
    for key, value in given.items():
        if isinstance(value, Mapping):
            below = merged.get(key, {})
            merged[key] = _over(below if isinstance(below, Mapping) else {}, value)
        elif value is not None:
            merged[key] = value
    return merged


def _table(config: Path | None) -> dict[str, Any]:
    table = read_table(config)
    tls = table.get("tls")
    for section, keys in ((table, ("state",)), (tls if isinstance(tls, dict) else {}, ("keys", "authority"))):
        for key in keys:
            value = section.get(key)
            if config is not None and isinstance(value, str):
                section[key] = beside(config, value)
    roots = table.get("roots")
    if config is not None and isinstance(roots, list):
        table["roots"] = [
            beside(config, root) if isinstance(root, str) and not root.startswith(PREFIX) else root
            for root in roots
        ]
    return table
