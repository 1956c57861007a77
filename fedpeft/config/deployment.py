"""What a run file says otherwise to a server with agents than to a simulation; no torch is needed for it."""

from __future__ import annotations

import json

from fedpeft.config.sections import RunConfig

_OWN_FILES = "each agent's owner says how its own files are written (client.toml), or it is found out"
_IGNORED = {
    "data.train": "each agent brings its own rows",
    "data.partitioner": "each agent brings its own rows",
    "data.encoding": _OWN_FILES,
    "data.separator": _OWN_FILES,
    "data.quoting": _OWN_FILES,
    "model.device": "each agent computes on its own device",
    "federation.clock": "real agents are as quick as they are",
    "evaluation.baselines": "nobody has the rows for them",
}


def clients_named(run: RunConfig) -> int:
    """Return the number of clients that a run file names, by its partitioner or its files; 0: it doesn't."""
    named, train = run.data.partitioner, run.data.train
    files = len(train) if named.kind == "files" and isinstance(train, tuple) else 0
    return named.clients or files


def find_ignored_keys(run: RunConfig) -> dict[str, str]:
    """Return the keys that a run file sets and that play no part with agents, each with the reason."""
    tables = json.loads(run.identity)
    return {key: why for key, why in _IGNORED.items() if _holds(tables, key)}


def _holds(tables: dict[str, dict[str, object]], dotted: str) -> bool:
    section, key = dotted.split(".")
    return key in tables.get(section, {})
