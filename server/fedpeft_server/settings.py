"""server.toml and the command line as one frozen value."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedpeft.errors import UsageError
from fedpeft_server.options import TransportOptions
from fedpeft_server.serving import is_loopback

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0.0)]
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
    """What agents may use of this machine; `TransportOptions` has the reasons of the defaults."""

    agents: Count = 4096  # connected at a time
    blob_mib: Count = 4096  # one update
    uploads: Count = 4  # at a time, the others wait
    downloads: Count = 16
    heartbeat_s: Seconds = 15.0
    stall_s: Seconds = 30.0


class LogSection(_Section):
    """How the daemon's own log is written, on standard error; each run has a log of its own."""

    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"


class Settings(_Section):
    """What a server is started with.

    Attributes:
        listen: host and port; port 0 takes a free one.
        state: the folder of everything that outlives the daemon.
        database: an SQLAlchemy URL; empty: an SQLite file in `state`.
        parallel_runs: held at a time; the others are queued.
        insecure: plaintext, for agents on this very machine.
        drain_s: what runs get to reach a safe point when the daemon is told to end.
    """

    listen: str = f"127.0.0.1:{DEFAULT_PORT}"
    state: Path = Path("fedpeft-state")
    database: str = ""
    parallel_runs: Count = 1
    insecure: bool = False
    drain_s: Seconds = 30.0
    tls: TlsSection = TlsSection()
    limits: LimitsSection = LimitsSection()
    log: LogSection = LogSection()

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
            max_sessions=self.limits.agents,
        )


def read_settings(config: Path | None, given: Mapping[str, Any]) -> Settings:
    """The file's settings with those given on the command line over them; relative paths are the file's.

    Args:
        given: nested as the file is; None stands for what wasn't given.

    Raises:
        UsageError: every problem, in one line.
    """
    where = str(config or "fedpeft server")
    try:
        settings = Settings.model_validate(_over(_table(config), given))
    except ValidationError as error:
        raise UsageError(f"{where}: {'; '.join(_problem(detail) for detail in error.errors())}") from error
    host, colon, port = settings.listen.rpartition(":")
    if not (host and colon and port.isdecimal() and int(port) < 65536):
        raise UsageError(f"{where}: listen is {settings.listen!r}; give HOST:PORT")
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
    if config is None:
        return {}
    try:
        table = tomllib.loads(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{config}: cannot be read as TOML ({error})") from error
    tls = table.get("tls")
    for section, keys in ((table, ("state",)), (tls if isinstance(tls, dict) else {}, ("keys", "authority"))):
        for key in keys:
            value = section.get(key)
            if isinstance(value, str):
                section[key] = str((config.parent.resolve() / Path(value).expanduser()).resolve())
    return table


def _problem(detail: Any) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"{where}: unknown key; remove it or check its spelling"
    return f"{where}: {str(detail['msg']).removeprefix('Value error, ')}, got {detail['input']!r}"
