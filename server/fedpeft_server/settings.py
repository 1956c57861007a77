"""server.toml and the command line as one frozen value."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from fedpeft.data.hub import PREFIX
from fedpeft.errors import UsageError
from fedpeft.settings_file import beside, checked, read_table
from fedpeft.telemetry import LogFormat, LogLevel, is_address
from fedpeft_server.options import TransportOptions
from fedpeft_server.roots import Roots
from fedpeft_server.serving import is_loopback
from fedpeft_server.store import Quota

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0.0)]
Rate = Annotated[float, Field(gt=0.0)]
DEFAULT_PORT = 9440


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TlsSection(_Section):
    """Certificates, as `fedpeft provision` makes them.

    Attributes:
        keys: the folder with the server's key and certificate.
        authority: the authority's folder, where devices enrol and renew here; None: they do so elsewhere.
    """

    keys: Path | None = None
    authority: Path | None = None


class LimitsSection(_Section):
    """What agents and people may use of this machine; `TransportOptions` has the reasons of the defaults."""

    agents: Count = 4096  # connected at a time
    connections: Count = 8192  # of agents and people, with a call or without
    streams: Count = 16  # calls of one caller that are open at a time
    calls_per_s: Rate = 20.0  # of one caller; ten seconds' worth may come at once
    messages_per_s: Rate = 100.0  # in one session, as calls
    sessions_per_minute: Count = 60  # of one agent
    agent_mib_per_hour: Count = 32_768  # of updates and models, both ways
    refusals_per_hour: Count = 60  # of what only a hostile or broken caller sends; then it has to wait
    blob_mib: Count = 4096  # one update
    uploads: Count = 4  # at a time, the others wait
    downloads: Count = 16
    heartbeat_s: Seconds = 15.0
    stall_s: Seconds = 30.0
    turn_s: Seconds = 60.0  # of a large update, while others wait
    submitter_runs: Count = 16  # of one submitter that have not ended
    submitter_rounds: Count = 50_000  # of these runs together
    submitter_gib: Count = 64  # that all runs of one submitter keep on the disk
    away_s: Seconds = 600.0  # of members, before such a round does without them
    model_task_s: Seconds = 7200.0  # of a model's process: to load, evaluate or export once
    check_s: Seconds = 300.0  # of a run file that is submitted
    round_s: Seconds = 21_600.0  # for a round's last answers, where the run file sets no deadline


class LogSection(_Section):
    """How the daemon's own log is written, on standard error; each run has a log of its own."""

    format: LogFormat = "text"
    level: LogLevel = "info"


class MetricsSection(_Section):
    """Numbers for Prometheus, over plain HTTP and without a login: whoever reaches the address reads them.

    Attributes:
        address: host and port; empty: nowhere.
    """

    address: str = ""


class Settings(_Section):
    """What a server is started with.

    Attributes:
        listen: host and port; port 0 takes a free one.
        state: the folder of everything that outlives the daemon.
        database: an SQLAlchemy URL; empty: an SQLite file in `state`.
        parallel_runs: held at a time; the others are queued.
        insecure: plaintext, for agents on this very machine.
        roots: folders below which submitters' run files may name files (data.test, model.path,
            evaluation.plug_into), and data sets as "datasets:OWNER/NAME"; empty: they name none.
        drain_s: what runs get to reach a safe point when the daemon is told to end.
        model_s: how long the process that holds a model stays when nothing is to be evaluated or exported; 0:
            the daemon holds models itself.
    """

    listen: str = f"127.0.0.1:{DEFAULT_PORT}"
    state: Path = Path("fedpeft-state")
    database: str = ""
    parallel_runs: Count = 1
    insecure: bool = False
    roots: tuple[str, ...] = ()
    drain_s: Seconds = 30.0
    model_s: Annotated[float, Field(ge=0.0)] = 60.0
    tls: TlsSection = TlsSection()
    limits: LimitsSection = LimitsSection()
    log: LogSection = LogSection()
    metrics: MetricsSection = MetricsSection()

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


def read_settings(config: Path | None, given: Mapping[str, Any]) -> Settings:
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
    if settings.insecure == (settings.tls.keys is not None):
        raise UsageError(
            f"{where}: give either --keys DIR, the server folder that fedpeft provision made, or --insecure"
            " on 127.0.0.1"
        )
    return settings


def with_given(config: Path | None, given: Mapping[str, Any]) -> Settings:
    """As `read_settings`, for commands beside a server's: whether a server could start so is not asked."""
    return checked(Settings, _over(_table(config), given), source=str(config or "fedpeft server"))


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
