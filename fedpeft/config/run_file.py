"""Reading, overriding, resolving and identifying run files."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from fedpeft.config.key_hints import suggest_key
from fedpeft.config.run_identity import identity_digest, read_identity
from fedpeft.config.sections import RunConfig
from fedpeft.errors import RunFileError, UsageError

_INDEX_DIGITS = 9
_LONGEST_VALUE = 200  # characters of a value that a message shows


def load_run(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file, lay `--set` overrides over it and check it.

    Relative data and model paths are resolved against the run file's folder when they exist there.

    Args:
        path: a TOML file.
        overrides: items like ``training.lr=1e-4``; values are TOML, bare words are strings; no value
            takes the key out of the file.

    Raises:
        RunFileError: with every problem of the file at once.
        UsageError: an override that is not ``key=value``.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise RunFileError(
            str(path), [f"cannot be read ({error.strerror}); give the path of a TOML run file"]
        ) from error
    return run_from_toml(text, overrides, source=str(path), folder=path.parent)


def run_from_toml(
    text: bytes, overrides: Sequence[str] = (), *, source: str, folder: Path | None = None
) -> RunConfig:
    """Check a run given as the bytes of a TOML file; see `load_run`.

    Args:
        source: what error messages call it.
        folder: what relative paths are resolved against; None: they stay as they are.
    """
    try:
        table = tomllib.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RunFileError(
            source, [f"is not TOML: byte {error.start} is not UTF-8; save it as UTF-8"]
        ) from error
    except (tomllib.TOMLDecodeError, ValueError, RecursionError) as error:
        raise RunFileError(source, [f"is not TOML: {error}"]) from error
    return build_run(table, overrides, source=source, folder=folder)


def build_run(
    table: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str, folder: Path | None = None
) -> RunConfig:
    """Check a run given as nested tables; see `load_run`."""
    merged = json.loads(json.dumps(table, default=str))
    for item in overrides:
        _set(merged, item)
    if folder is not None:
        _resolve_paths(merged, folder)
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        raise RunFileError(source, validation_problems(error)) from error


def run_digest(run: RunConfig) -> str:
    """Return the SHA-256 (hex) of a run's identity: equal digests mean the same run."""
    return identity_digest(run.identity)


def run_json(run: RunConfig) -> str:
    """Return a run's identity as text, for messages and for keeping; see `fedpeft.config.run_identity`."""
    return run.identity


def run_from_json(text: str) -> RunConfig:
    """Read a run from its identity text, which it keeps, whatever this version's defaults are.

    Raises:
        RunFileError: with every problem of the text.
    """
    source = "run in message"
    try:
        tables = read_identity(text)
    except (ValueError, RecursionError) as error:
        raise RunFileError(source, [f"cannot be read: {error}"]) from error
    run = build_run(tables, source=source)
    run.__dict__["identity"] = text  # as the property itself keeps it
    return run


def run_toml(run: RunConfig) -> str:
    """The resolved run as TOML, every default written out (keys without a value are left out)."""
    return tomli_w.dumps(_without_none(run.model_dump(mode="json")))


def flat_keys(tables: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return nested tables as one, by dotted keys; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        flat |= flat_keys(value, f"{before}{key}.") if isinstance(value, dict) else {before + key: value}
    return flat


def validation_problems(error: ValidationError) -> list[str]:
    """Return what is wrong with tables, one line each: where, what is wrong, what came."""
    return [_problem(detail) for detail in error.errors()]


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value


def _set(table: dict[str, Any], item: str) -> None:
    """Apply one ``a.b.c=value`` to nested tables; lists are addressed by index (``stages.0.density``).

    Without a value the entry is taken out.
    """
    dotted, sep, raw = item.partition("=")
    keys = dotted.strip().split(".")
    if not sep or not all(keys):
        raise UsageError(f"--set {item!r}: needs KEY=VALUE with a dotted key, such as training.lr=1e-4")
    try:
        value = tomllib.loads(f"v = {raw}")["v"]
    except (ValueError, RecursionError):  # also integers of more digits than Python reads
        value = raw
    node: Any = table
    for key in keys[:-1]:
        node = _child(node, key, item)
    last = keys[-1]
    if not isinstance(node, list | dict):
        raise UsageError(f"--set {item!r}: {'.'.join(keys[:-1])} is a value, not a table")
    place: Any = _index(node, last, item) if isinstance(node, list) else last
    if raw.strip():
        node[place] = value
    elif isinstance(node, list) or place in node:
        del node[place]
    else:
        raise UsageError(f"--set {item!r}: the run file has no {dotted.strip()} that could be taken out")


def _child(node: Any, key: str, item: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, key, item)]
    if not isinstance(node, dict):
        raise UsageError(f"--set {item!r}: {key!r} is inside a value, not a table")
    child = node.setdefault(key, {})
    if isinstance(child, str):  # a bare name stands for a table with `kind`
        child = node[key] = {"kind": child}
    return child


def _index(node: list[Any], key: str, item: str) -> int:
    if not key.isdecimal() or len(key) > _INDEX_DIGITS or int(key) >= len(node):
        raise UsageError(f"--set {item!r}: {key!r} is no index of a list of {len(node)}")
    return int(key)


def _resolve_paths(table: dict[str, Any], folder: Path) -> None:
    """Make paths relative to the run file absolute where such a file or folder exists."""

    def resolved(value: Any) -> Any:
        if isinstance(value, list):
            return [resolved(item) for item in value]
        if not isinstance(value, str):
            return value
        if value.startswith("~"):
            return _at_home(value)
        if Path(value).is_absolute() or not value:
            return value
        try:
            there = (folder / value).exists()
            found = there or (any(mark in value for mark in "*?[") and any(folder.glob(value)))
        except (OSError, ValueError, NotImplementedError):  # no path: too long, or with signs that none has
            return value
        # Links stay: their names tell formats and clients, not those of what they lead to.
        return os.path.normpath(folder.absolute() / value) if found else value

    for section, keys in (
        ("model", ("path",)),
        ("data", ("train", "test")),
        ("evaluation", ("plug_into",)),
    ):
        part = table.get(section)
        if isinstance(part, dict):
            for key in keys:
                if key in part and part[key] != "embedded":
                    part[key] = resolved(part[key])


def _at_home(value: str) -> str:
    """A path below the user's own folder; as it came where there is no such user."""
    try:
        return str(Path(value).expanduser())
    except RuntimeError:
        return value


def _problem(detail: Mapping[str, Any]) -> str:
    """One pydantic error as one line: where, what is wrong, what came."""
    where = ".".join(_locations(detail["loc"])) or "run file"
    message = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        return f"{where}: unknown key{suggest_key(where) or '; remove it or check its spelling'}"
    if detail["type"] == "missing":
        return f"{where}: is needed and missing"
    if detail["type"] == "union_tag_not_found":
        return f"{where}.kind: is needed and missing"
    if detail["type"] == "union_tag_invalid":
        return f"{where}.kind: {detail['ctx']['tag']!r} came; use one of {detail['ctx']['expected_tags']}"
    if detail["type"] == "value_error":
        return f"{where}: {message}"
    came = repr(detail["input"])
    return f"{where}: {message}, got {came if len(came) <= _LONGEST_VALUE else came[:_LONGEST_VALUE] + '...'}"


def _locations(loc: Iterable[Any]) -> list[str]:
    """Location parts without the names of union members, which mean nothing to a reader."""
    noise = ("function-", "tuple[", "dict[", "constrained-", "str", "int", "float", "bool")
    parts = list(loc)
    tagged = parts[:1] == ["privacy"]  # pydantic puts the kind behind it
    return [
        str(part)
        for part in (parts[:1] + parts[2:] if tagged else parts)
        if isinstance(part, int) or not str(part).startswith(noise) or part in ("strategy",)
    ]
