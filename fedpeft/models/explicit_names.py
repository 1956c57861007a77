"""Expressions of a run file over module names become the names that they matched, before `peft` sees them.

`peft` matches an expression with `re`, at every module and for as long as it takes; see
`fedpeft.runtime.name_patterns`. What it gets instead is an alternation of literal names, which means the
same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from fedpeft.errors import ModelError
from fedpeft.models.methods import Method
from fedpeft.runtime.name_patterns import NamePattern, is_plain

__all__ = ["SELECTORS", "pattern_problems", "with_explicit_names"]

SELECTORS = ("target_modules", "feedforward_modules", "exclude_modules")
"""Options whose text is one expression for whole names."""

_PER_MODULE = "_pattern"  # ends the names of options that give values to modules: a table by expression
_LAYERS = "layers_pattern"
_BELOW_A_DOT = ("FourierFTConfig", "C3AConfig")  # of whose tables `peft` wants a dot before what is matched


def pattern_problems(given: Mapping[str, Any]) -> list[str]:
    """What the texts alone show to be wrong; no model is needed."""
    problems = []
    for key, text in _expressions(given):
        try:
            NamePattern(text, f"peft.{key}")
        except ModelError as error:
            problems.append(str(error))
    problems.extend(
        f"peft.{_LAYERS} '{name}' is no name of a list of layers, such as 'layers'"
        for name in _list(given.get(_LAYERS))
        if not is_plain(name)
    )
    if isinstance(given.get("modules_to_save"), str):
        problems.append("peft.modules_to_save needs a list of module names")
    return problems


def with_explicit_names(method: Method, options: Mapping[str, Any], base: nn.Module) -> dict[str, Any]:
    """Return the options with literal names in place of expressions.

    Raises:
        ModelError: an expression takes too long.
    """
    names = [name for name, _ in base.named_modules() if name]
    explicit = dict(options)
    for key, value in options.items():
        if key in SELECTORS and isinstance(value, str) and value != "all-linear":
            explicit[key] = _either(NamePattern(value, f"peft.{key}").matching(names))
        elif _is_table(key, value):
            explicit[key] = _by_name(f"peft.{key}", value, names, method.config in _BELOW_A_DOT)
    return explicit


def _by_name(key: str, table: Mapping[str, Any], names: Iterable[str], below: bool) -> dict[str, Any]:
    """The table with names in the place of expressions; a name has the value of the first that matches it."""
    patterns = {text: NamePattern(text, key) for text in table if not is_plain(text)}
    if not patterns:
        return dict(table)
    known = sorted(names, key=len, reverse=True)
    chosen: dict[str, list[str]] = {text: [] for text in table}
    for name in known:
        first = next((text for text in table if _ends(patterns.get(text), text, name)), None)
        if first is not None:
            chosen[first].append(name.partition(".")[2] if below and "." in name else name)
    return {_either(found) if found else re.escape(text): table[text] for text, found in chosen.items()}


def _ends(pattern: NamePattern | None, text: str, name: str) -> bool:
    if pattern is not None:
        return pattern.ends(name)
    return name == text or name.endswith(f".{text}")


def _either(names: Sequence[str]) -> str:
    """An expression for these names and nothing else; of no name, one that matches nothing."""
    return f"(?:{'|'.join(map(re.escape, names))})" if names else "(?!)"


def _expressions(given: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for key, value in given.items():
        if key in SELECTORS and isinstance(value, str):
            yield key, value
        elif _is_table(key, value):
            yield from ((key, str(text)) for text in value)


def _is_table(key: str, value: Any) -> bool:
    return key.endswith(_PER_MODULE) and isinstance(value, Mapping)


def _list(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [str(item) for item in value] if isinstance(value, Sequence) else []
