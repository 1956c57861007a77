"""`fedpeft server`, and its `backup` and `restore`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedpeft.errors import UsageError
from fedpeft_server.ops.backup import Manifest, Places, back_up, restore
from fedpeft_server.ops.server_settings import ServerSettings, read_settings, with_given


def server_command(config: Path | None, given: Mapping[str, Any], *, migrate: bool) -> int:
    """Serve until told to end; the exit code.

    Raises:
        FedPEFTError: it cannot start; see `run_daemon`.
    """
    from fedpeft_server.ops.daemon import run_daemon  # brings torch and all that stands on it

    return run_daemon(read_settings(config, given), migrate=migrate)


def backup_command(
    out: Path, config: Path | None, given: Mapping[str, Any], *, with_keys: bool, as_json: bool
) -> None:
    """Write a backup and say what is in it; raises as `back_up`."""
    manifest = back_up(_places(with_given(config, given), with_keys=with_keys), out)
    _say(manifest, out, f"written to {out}", as_json=as_json)


def restore_command(
    file: Path,
    config: Path | None,
    given: Mapping[str, Any],
    *,
    with_keys: bool,
    nothing_since: bool,
    as_json: bool,
) -> None:
    """Put a backup in its place and say what came; raises as `restore`."""
    places = _places(with_given(config, given), with_keys=with_keys)
    manifest = restore(file, places, nothing_since=nothing_since)
    _say(manifest, file, f"restored to {places.state}; start the server", as_json=as_json)


def _places(settings: ServerSettings, *, with_keys: bool) -> Places:
    if with_keys and settings.tls.keys is None:
        raise UsageError("--with-keys needs --config with a [tls] table that says where they are")
    keys, authority = (settings.tls.keys, settings.tls.authority) if with_keys else (None, None)
    return Places(settings.state, settings.database or None, keys, authority)


def _say(manifest: Manifest, file: Path, what: str, *, as_json: bool) -> None:
    size = file.stat().st_size
    if as_json:
        counts = {"files": len(manifest.files), "bytes": size, "taken_at": manifest.taken_at}
        print(json.dumps({"file": str(file), "software": manifest.software, **counts}))
    else:
        print(f"{len(manifest.files)} files, {size / 1e6:.1f} MB, by {manifest.software}; {what}")
