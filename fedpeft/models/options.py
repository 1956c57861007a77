"""Options of a PEFT method: the keys of `[peft]` checked against the fields of its config class."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import peft

from fedpeft.config.key_hints import suggest_option
from fedpeft.config.sections import PeftSection
from fedpeft.errors import ModelError
from fedpeft.models.explicit_names import pattern_problems
from fedpeft.models.methods import REFUSED_OPTIONS, Method, init_refusal, method_named
from fedpeft.models.option_types import MODULE_OPTIONS, annotations_of, fits, is_open
from fedpeft.models.quiet import one_line, quiet
from fedpeft.models.tuners import OWN_CONFIGS

TASK_TYPES: Mapping[str, str] = {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}
"""Our task names -> those of `peft`."""

_OURS = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"}
    | {"runtime_config", "task_type"}
)


def config_class(method: Method) -> type[Any]:
    """Return the dataclass that configures the method.

    Raises:
        ModelError: the installed `peft` has no such class.
    """
    found = OWN_CONFIGS.get(method.config) or getattr(peft, method.config, None)
    if found is None:
        raise ModelError(
            f"peft.method '{method.name}' needs {method.config}, which peft {peft.__version__} lacks; "
            "upgrade peft"
        )
    return found


def peft_problems(section: PeftSection, task: str) -> tuple[str, ...]:
    """Return every problem that the section alone shows, one line each; no model is loaded."""
    try:
        method = method_named(section.method)
        config = config_class(method)
        fields = {f.name: f for f in dataclasses.fields(config) if f.init and f.name not in _OURS}
        annotations = annotations_of(config)
    except ModelError as error:
        return (str(error),)
    problems = []
    if task not in method.tasks:
        problems.append(f"peft.method '{method.name}' works for {', '.join(method.tasks)}, not for '{task}'")
    for key, value in section.options.items():
        problem = _option_problem(method, fields, key, value)
        if problem is None and key in fields:
            problem = _type_problem(method, key, annotations[key], value)
        if problem:
            problems.append(problem)
    return (*problems, *pattern_problems(section.options))


def validate_peft(section: PeftSection, task: str) -> None:
    """Check what needs no model: the method, its task, and the names and types of its options.

    Raises:
        ModelError: all problems, in one line.
    """
    problems = peft_problems(section, task)
    if problems:
        raise ModelError("; ".join(problems))


def build_config(method: Method, options: Mapping[str, Any], task: str) -> Any:
    """Make the `peft` config from checked and completed options.

    Raises:
        ModelError: the config class refuses a value.
    """
    try:
        with quiet():
            return config_class(method)(task_type=TASK_TYPES[task], **options)
    except (TypeError, ValueError, ImportError) as error:
        raise ModelError(f"peft.method '{method.name}' refuses its options: {one_line(error)}") from error


def _option_problem(
    method: Method, fields: Mapping[str, dataclasses.Field[Any]], key: str, value: Any
) -> str | None:
    if key in method.fixed:
        return f"peft.{key} is part of what '{method.name}' is; leave it out, or choose another method"
    if key not in fields:
        near = suggest_option(key, "peft", fields)
        hint = f"did you mean '{near}'?" if near else f"known: {', '.join(sorted(fields))}"
        return f"peft.{key} is no option of '{method.name}'; {hint}"
    if value and key in REFUSED_OPTIONS:
        return f"peft.{key} is refused: {REFUSED_OPTIONS[key]}"
    refusal = init_refusal(value) if key == "init_lora_weights" else None
    if refusal is not None:
        return f"peft.init_lora_weights '{value}' is refused: {refusal}"
    wanted = _number_wanted(fields[key])
    if wanted and not _is_number(value, wanted):
        kind = "a whole number" if wanted == "int" else "a number"
        return f"peft.{key} is {value!r}; '{method.name}' needs {kind}"
    return None


def _type_problem(method: Method, key: str, annotation: Any, value: Any) -> str | None:
    """What speaks against an option, or against its value, by the annotation that `peft` gives it."""
    if not is_open(key, annotation):
        return f"peft.{key} is refused: run files set numbers, choices and names of modules; leave it out"
    if fits(key, annotation, value):
        return None
    if key in MODULE_OPTIONS:
        return f"peft.{key} is {value!r}; '{method.name}' needs a list of module names or one expression"
    wanted = str(annotation).replace("typing.", "")
    return f"peft.{key} is {str(value)[:80]!r}; '{method.name}' takes {wanted[:120]}"


def _number_wanted(field: dataclasses.Field[Any]) -> str | None:
    """Tell fields annotated as plain numbers; anything richer is for the config class to judge."""
    name = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")
    return name if name in ("int", "float") else None


def _is_number(value: Any, wanted: str) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (wanted == "float" and isinstance(value, float))
