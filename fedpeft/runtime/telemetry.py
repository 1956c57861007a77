"""What server and agents tell those who watch over them: a log on standard error, and numbers for Prometheus.

Neither holds a secret: no keys, tokens, passwords, rows or update contents are ever handed to them, and a
number's labels are names of ours.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from prometheus_client import CollectorRegistry, start_http_server

from fedpeft.errors import FederationError
from fedpeft.runtime.safe_text import one_line, replace_unprintable

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def set_up_log(
    level: str, format_: LogFormat, *, clock: str = "%Y-%m-%d %H:%M:%S", out: TextIO | None = None
) -> None:
    """Write the log of this process's `fedpeft` to `out` (default: standard error), and nowhere else.

    Args:
        format_: lines for people, or one JSON object each.
        clock: of the lines for people, as `time.strftime`; JSON has ISO 8601 in UTC.
    """
    handler = logging.StreamHandler(out or sys.stderr)
    lines = TextLines("%(asctime)s %(levelname)-7s %(message)s", clock)
    handler.setFormatter(JsonLines() if format_ == "json" else lines)
    logger = logging.getLogger("fedpeft")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False


class TextLines(logging.Formatter):
    """One line per event, whatever names and texts of others are in it; a trace follows indented."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's
        """See the class."""
        record.message = one_line(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's
        """The trace; no line of it begins where a line of the log does."""
        trace = super().formatException(ei)
        return "\n".join("  " + replace_unprintable(line) for line in trace.split("\n"))


class JsonLines(logging.Formatter):
    """One object per line: `time`, `level`, `text`, and what else was given with the line (`extra`)."""

    def format(self, record: logging.LogRecord) -> str:
        """See the class."""
        extra = {key: value for key, value in vars(record).items() if key not in _STANDARD}
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname.lower(), "text": record.getMessage(), **extra}
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def is_address(listen: str) -> bool:
    """Whether that is HOST:PORT."""
    host, colon, port = listen.rpartition(":")
    return bool(host and colon) and port.isdecimal() and int(port) < 65536


def expose(registry: CollectorRegistry, listen: str) -> tuple[str, Callable[[], None]]:
    """Serve `/metrics` at HOST:PORT over plain HTTP; the address with its real port, and how to end it.

    Whoever reaches the address reads the numbers: it should be this machine's own, or of a network on which
    only Prometheus is.

    Raises:
        FederationError: the address cannot be listened on.
    """
    host, _, port = listen.rpartition(":")
    try:
        server, thread = start_http_server(int(port), host.strip("[]"), registry)
    except OSError as error:
        raise FederationError(
            f"metrics: {listen} cannot be listened on (in use, or not of this machine); choose another port"
        ) from error

    def end() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return f"{host}:{server.server_port}", end
