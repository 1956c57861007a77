"""What two adapters' configurations must agree in to be merged: whatever changes what their tensors mean.

Where an adapter's tensors lie is told by their names, and how large they are by their shapes; who wrote the
adapter, from which path and with which dropout changes nothing.
"""

from collections.abc import Mapping
from typing import Any

__all__ = ["first_difference"]

_NO_MATTER = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "megatron_config",
        "megatron_core",
        "peft_version",
        "revision",
        "runtime_config",
        "task_type",
    }
)
_TOLD_BY_NAMES = frozenset(
    {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters"}
)
_ONLY_AT_START = frozenset({"corda_config", "eva_config", "lora_ga_config", "loftq_config"})
_ANOTHER_BASE = ("pissa", "olora", "corda", "fedpeft")  # values of init_lora_weights that rewrite the base


def first_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the first key, sorted, in which two configurations differ for good, with both values.

    A key that one of them lacks counts as off, as versions of `peft` add keys that are off by default; lists
    of names count as sets.
    """
    for key in sorted(one.keys() | other.keys()):
        if key in _NO_MATTER | _TOLD_BY_NAMES | _ONLY_AT_START or key.endswith("dropout"):
            continue
        if _meaning(key, one.get(key)) != _meaning(key, other.get(key)):
            return key, one.get(key), other.get(key)
    return None


def _meaning(key: str, value: Any) -> Any:
    """A value without what makes no difference."""
    if key.startswith("init_"):
        return value if isinstance(value, str) and value.startswith(_ANOTHER_BASE) else None
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return frozenset(value) or None
    return None if value in (False, {}, "none") else value
