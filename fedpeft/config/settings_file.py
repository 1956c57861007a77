"""TOML files with settings of a program on one machine, such as `server.toml`: reading, and what is wrong."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from fedpeft.errors import UsageError

Model = TypeVar("Model", bound=BaseModel)


def read_table(path: Path | None) -> dict[str, Any]:
    """The file's tables; none for no file.

    Raises:
        UsageError: it cannot be read, or is not TOML.
    """
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:  # of what is no UTF-8, no TOML, or no number
        raise UsageError(f"{path}: cannot be read as TOML ({error})") from error


def beside(path: Path, value: str) -> str:
    """A path as a file means it: relative to the file's own folder, with ``~`` for the user's.

    Links stay as they are: the name of one to a file of rows tells its format, and may name the client.
    """
    try:
        own = Path(value).expanduser()
    except RuntimeError:  # there is no such user
        own = Path(value)
    return os.path.abspath(path.parent / own)


def check_table(model: type[Model], table: Mapping[str, Any], *, source: str) -> Model:
    """The table as a model.

    Raises:
        UsageError: every problem, in one line that begins with `source`.
    """
    try:
        return model.model_validate(table)
    except ValidationError as error:
        problems = "; ".join(_problem(detail) for detail in error.errors())
        raise UsageError(f"{source}: {problems}") from error


def _problem(detail: Any) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"{where}: unknown key; remove it or check its spelling"
    if detail["type"] == "missing":
        return f"{where} is needed; give --{where}, or write it into the file"
    return f"{where}: {str(detail['msg']).removeprefix('Value error, ')}, got {detail['input']!r}"
