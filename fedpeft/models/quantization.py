"""Quantised bases: what the loader is told, what is left alone, and how a loaded base is known again."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from fedpeft.config.sections import ModelSection
from fedpeft.errors import MissingExtraError, ModelError
from fedpeft.models.heads import outer_modules
from fedpeft.models.rounded_linear import Levels
from fedpeft.models.rounded_loading import RoundedConfig

__all__ = [
    "DTYPES",
    "find_unquantised_modules",
    "lean_heap",
    "levels_asked",
    "quantization_config",
    "quantization_of",
    "settle_quantised",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LEAN_FROM = 32_000_000
"""Parameters from which a model's tensors are so large that `lean_heap` costs next to nothing."""

_M_MMAP_THRESHOLD = -3  # its number in malloc.h
_BITS = {"rtn8": 8, "rtn4": 4}
_OFTEN_NEW = "pooler"  # a layer that many encoders' files lack; what is drawn is trained, so it stays whole


def quantization_config(section: ModelSection, skeleton: Callable[[], nn.Module]) -> Any:
    """Return what `from_pretrained` takes for the section's quantisation.

    int8, nf4 and fp4 are bitsandbytes'; rtn8 and rtn4 are `fedpeft.models.rounded_linear`. The output head,
    tied weights, a classifier's head and pooler stay as they are, with `keep_modules`.

    Args:
        skeleton: makes the model without weights.

    Raises:
        ModelError: `keep_modules` names no layer, or one that is never quantised anyway, or all layers stay.
        MissingExtraError: bitsandbytes is needed and not installed.
    """
    kind = section.quantization
    if kind not in _BITS and find_spec("bitsandbytes") is None:
        raise MissingExtraError(
            f"model.quantization '{kind}' needs bitsandbytes; install the extra: pip install 'fedpeft[quant]'"
        )
    kept = find_unquantised_modules(section, skeleton())
    dtype = DTYPES[section.compute_dtype or section.dtype]
    if kind in _BITS:
        own = None if section.compute_dtype is None else dtype
        return RoundedConfig(_BITS[kind], section.group_size, kept, own)
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=section.double_quantization is not False,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )


def levels_asked(section: ModelSection) -> Levels | None:
    """How finely the section rounds weights to integers; None: not at all."""
    bits = _BITS.get(section.quantization)
    return None if bits is None else Levels(bits, section.group_size)


def find_unquantised_modules(section: ModelSection, model: nn.Module) -> list[str]:
    """Full names of the layers that stay.

    Raises:
        ModelError: `keep_modules` names no layer, or all layers stay.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    kept = {name for name in linear if _under(name, get_keys_to_not_convert(model))}
    if section.task == "sequence-classification":
        heads = outer_modules(model)
        kept |= {name for name in linear if _under(name, heads) or _OFTEN_NEW in name.split(".")}
    for given in section.keep_modules:
        found = [name for name in linear if _is_named(name, given)]
        if not found:
            leaves = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise ModelError(
                f"model.keep_modules names '{given}', which holds no linear layer; there are: {leaves}"
            )
        kept.update(found)
    if kept.issuperset(linear):
        raise ModelError(
            f"model.keep_modules leaves nothing to quantise to {section.quantization}; keep fewer, or set"
            " model.quantization 'none'"
        )
    return sorted(kept)


def _under(name: str, owners: Iterable[str]) -> bool:
    return any(name == owner or name.startswith(f"{owner}.") for owner in owners)


def _is_named(name: str, given: str) -> bool:
    """A whole name, the end of one, or a module around it: "up_proj", "layers.0", "model.layers.0.mlp"."""
    return f".{given}." in f".{name}."


def quantization_of(base: nn.Module) -> str:
    """Return "int8", "nf4", "fp4", "rtn8", "rtn4" or "none"."""
    if getattr(base, "is_loaded_in_8bit", False):
        return "int8"
    config: Any = getattr(base, "config", None)
    told: Any = getattr(config, "quantization_config", None)
    if getattr(base, "is_loaded_in_4bit", False):
        return str(told.bnb_4bit_quant_type)
    return f"rtn{told.bits}" if isinstance(told, RoundedConfig) else "none"


def lean_heap() -> None:
    """Let freed blocks of 1 MiB and more go back to the system, for the rest of this process's life.

    For quantised bases, and plain ones of `LEAN_FROM` parameters.

    glibc raises its own threshold to 32 MiB as blocks are freed, and keeps such blocks in a heap of gaps.
    Measured on a Llama of 98 million parameters: LoRA on NF4 peaks at 0.56 GiB instead of 1.06.
    """
    _glibc("mallopt", _M_MMAP_THRESHOLD, 2**20)


def settle_quantised(model: nn.Module) -> None:
    """Bring a base that was just loaded into the form in which it stays; nothing for a plain one."""
    if quantization_of(model) == "none":
        return
    _keep_codes(model)
    _release()


def _keep_codes(model: nn.Module) -> None:
    """Keep 4-bit layers from repacking themselves at their first evaluation on some CPUs.

    bitsandbytes does that for its AVX512-BF16 kernel, for good: scales lose bits, double quantisation is
    undone, and the frozen digest would depend on the machine and on what ran before.
    """
    layers: list[Any] = list(model.modules())
    for module in layers:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _release() -> None:
    """Give the memory of the full-precision tensors back, of which glibc keeps the freed blocks.

    Measured on 85 million quantised parameters: 30 MiB less held with nf4, 150 MiB less with int8.
    """
    _glibc("malloc_trim", 0)


def _glibc(function: str, *arguments: int) -> None:
    """Call a function of glibc; nothing where the C library is another one."""
    if sys.platform == "linux":
        found = getattr(ctypes.CDLL(None), function, None)
        if found is not None:
            found(*arguments)
