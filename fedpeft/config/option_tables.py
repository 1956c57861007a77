"""From a name and a table of options to the object that the name stands for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from fedpeft.errors import RunFileError


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """One line that says a name is unknown, which one was probably meant, and which there are."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{what}: unknown kind {name!r}{hint} Known: {', '.join(names)}"


def build_option(where: str, table: Mapping[str, Any], name: str, options: Mapping[str, Any]) -> Any:
    """Look `name` up in `table` and build it with `options`.

    Args:
        where: the run file's section, for errors.

    Raises:
        RunFileError: unknown name, unknown option or a value of the wrong kind, all at once.
    """
    if name not in table:
        raise RunFileError("run file", [unknown_name(where, name, table)])
    try:
        return table[name](**options)
    except TypeError as error:  # of a class that is no model
        raise RunFileError("run file", [f"{where} ({name}): {error}"]) from error
    except ValidationError as error:
        problems = []
        for detail in error.errors():
            key = ".".join(str(part) for part in detail["loc"])
            message = (
                "unknown option"
                if detail["type"] == "extra_forbidden"
                else f"{detail['msg']}, got {detail['input']!r}"
            )
            if detail["type"] == "missing":
                message = "is needed and missing"
            problems.append(f"{where}.{key} ({name}): {message}")
        raise RunFileError("run file", problems) from error
