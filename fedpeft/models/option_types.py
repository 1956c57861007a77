"""Which options of a PEFT method a run file may set, and to what: by name and type, from its config class.

An option is taken if its annotation is made of numbers, truth values, literal choices, names of modules and
lists or tables of these. What is annotated as text or as another configuration is refused unless it is named
here: among such options are a module to import, a tokenizer to load with keywords of its own, and folders.
"""

from __future__ import annotations

import enum
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from fedpeft.models.explicit_names import SELECTORS
from fedpeft.models.loftq import STARTS

_WORD = re.compile(r"[A-Za-z0-9_]{1,40}")
_WORDS = frozenset({"act_fn", "bias", "init_weights", "non_linearity", "wavelet_family"})
"""Options annotated as text that `peft` looks up in a table of its own."""

MODULE_OPTIONS = frozenset({*SELECTORS, "layers_pattern", "modules_to_save", "target_parameters"})
"""Options that name modules or parameters, which are compared with the model."""
_JUDGED_ELSEWHERE = frozenset({"loftq_config"})  # see `fedpeft.models.loftq.loftq_problem`
_MORE = {"init_lora_weights": frozenset(STARTS)}
"""Values of ours beside those of the annotation."""

_LEFT_OUT = frozenset({"TEXT"})  # of enumerations: a start from text asks for a tokenizer by name


def annotations_of(config: type[Any]) -> Mapping[str, Any]:
    """Return the annotations of a config class by field, resolved."""
    return typing.get_type_hints(config)


def is_open(key: str, annotation: Any) -> bool:
    """Whether a run file may set an option at all."""
    return key in _JUDGED_ELSEWHERE or any(form is not type(None) for form in _forms(key, annotation))


def fits(key: str, annotation: Any, value: Any) -> bool:
    """Whether a value is one that the option's annotation allows."""
    if key in _JUDGED_ELSEWHERE:
        return True
    if isinstance(value, str) and value in _MORE.get(key, ()):
        return True
    return any(_is_of(key, form, value) for form in _forms(key, annotation))


def _forms(key: str, annotation: Any) -> typing.Iterator[Any]:
    """The parts of an annotation that are allowed for an option."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        for part in typing.get_args(annotation):
            yield from _forms(key, part)
    elif annotation in (bool, int, float, type(None)) or origin in (typing.Literal, list):
        yield annotation
    elif annotation is str:
        if key in MODULE_OPTIONS or key in _WORDS:
            yield str
    elif isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        yield annotation
    elif origin is dict or (annotation is dict and key.endswith("_pattern")):
        yield dict


def _is_of(key: str, form: Any, value: Any) -> bool:
    origin = typing.get_origin(form)
    if form is bool or isinstance(value, bool):
        return isinstance(value, bool) and (
            form is bool or (origin is typing.Literal and value in form.__args__)
        )
    if form in (int, float):
        return isinstance(value, int) or (form is float and isinstance(value, float) and math.isfinite(value))
    if form is type(None):
        return value is None
    if origin is typing.Literal:
        return isinstance(value, str | int) and value in typing.get_args(form)
    if form is str:
        return isinstance(value, str) and (key in MODULE_OPTIONS or _WORD.fullmatch(value) is not None)
    if origin is list:
        return _is_list(value)
    if form is dict:
        return isinstance(value, Mapping) and all(_is_list(one) or _is_scalar(one) for one in value.values())
    return isinstance(value, str) and value in {one.value for one in form} - _LEFT_OUT


def _is_list(value: Any) -> bool:
    """A list of names or numbers; what the names mean is compared with the model."""
    return isinstance(value, Sequence) and not isinstance(value, str) and all(map(_is_scalar, value))


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float)
