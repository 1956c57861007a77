"""LoftQ: a quantised base and low-rank factors that together start near the full-precision weights.

Alternates Q = quantise(W - s B A) and s B A = the best rank-r approximation of W - Q, from B A = 0, and keeps
the pair of the least error |W - Q - s B A|. After one iteration Q is the plainly quantised weight; each
further one changes the codes of the frozen base.

Source: Li et al. 2023, "LoftQ" (arXiv 2310.08659), algorithm 1; Guo et al. 2024, LQ-LoRA (arXiv 2311.12023),
algorithm 1, which stops once the error rises. Both return the last pair; we return the best. The codes are
those of the base's own quantiser, on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedpeft.errors import ModelError
from fedpeft.models.checkpoint_files import saved_weights
from fedpeft.models.lqlora import first_packed
from fedpeft.models.rounding import RoundedLinear, levels_of, unpacked

__all__ = [
    "KINDS",
    "STARTS",
    "Decomposition",
    "Start",
    "decompose",
    "loftq_problem",
    "start_near_full_precision",
    "start_of",
]

KINDS = ("nf4", "fp4", "rtn8", "rtn4")
"""Quantisations whose layers can be packed anew."""

STARTS = {"loftq": 1, "lq-lora": 100}
"""Starts by the run file's name -> iterations that it takes at most, unless told."""

METHODS = ("lora", "rslora", "ffa-lora")
_OPTION = "init_lora_weights"
_KEYS = frozenset({"loftq_iter"})

Roundtrip = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Decomposition:
    """W is near quantise(packed) + up @ down, with `error` the Frobenius norm of what is missing.

    Shapes: packed (out, in), up (out, r), down (r, in); float32.
    """

    packed: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    error: float


def decompose(
    weight: torch.Tensor,
    roundtrip: Roundtrip,
    rank: int,
    iterations: int,
    start: torch.Tensor | None = None,
) -> Decomposition:
    """Alternate; see the module.

    Args:
        weight: W (out, in), float32.
        roundtrip: quantises a matrix and unpacks it again.
        rank: of the factors, at most; of a smaller matrix its own.
        iterations: at least 1.
        start: what is quantised first, of W's shape; default: W itself.
    """
    best: Decomposition | None = None
    packed = weight if start is None else start
    for _ in range(iterations):
        residual = weight - roundtrip(packed)
        left, sizes, right = torch.linalg.svd(residual, full_matrices=False)
        error = float(torch.linalg.vector_norm(sizes[rank:].double()))  # Eckart, Young 1936
        if best is not None and error >= best.error:
            break
        root = sizes[:rank].sqrt()
        best = Decomposition(packed, left[:, :rank] * root, root[:, None] * right[:rank], error)
        packed = weight - best.up @ best.down
    if best is None:
        raise ModelError(f"peft.loftq_config: loftq_iter is {iterations}; at least 1 is needed")
    return best


def loftq_problem(method: str, options: dict[str, Any], quantization: str) -> str | None:
    """What is wrong with such a start, if one is asked for; known before anything is loaded."""
    config, asked = options.get("loftq_config"), options.get(_OPTION)
    if asked not in STARTS:
        return None if config is None else f"peft.loftq_config needs peft.{_OPTION} 'loftq' or 'lq-lora'"
    if method not in METHODS:
        return f"peft.{_OPTION} '{asked}' works for {', '.join(METHODS)}, not for '{method}'"
    if quantization not in KINDS:
        kinds = ", ".join(f"'{kind}'" for kind in KINDS)
        return (
            f"peft.{_OPTION} '{asked}' starts from a quantised base; set model.quantization to one of {kinds}"
        )
    if config is not None and (not isinstance(config, dict) or not config.keys() <= _KEYS):
        return f"peft.loftq_config is {config!r}; it takes loftq_iter alone, as in {{loftq_iter = 1}}"
    turns = (config or {}).get("loftq_iter", STARTS[asked])
    if not isinstance(turns, int) or isinstance(turns, bool) or turns < 1:
        return f"peft.loftq_config: loftq_iter is {turns!r}; a whole number from 1 is needed"
    return None


@dataclass(frozen=True)
class Start:
    """Which decomposition a model starts from, by the run file's name for it, and its most iterations."""

    kind: str
    iterations: int

    @property
    def keeps_codes(self) -> bool:
        """Whether the base stays as it is plainly quantised."""
        return self.kind == "loftq" and self.iterations == 1


def start_of(options: dict[str, Any]) -> Start | None:
    """What the options ask for, once `loftq_problem` found nothing wrong; None: no such start."""
    kind = options.get(_OPTION)
    if kind not in STARTS:
        return None
    return Start(kind, (options.get("loftq_config") or {}).get("loftq_iter", STARTS[kind]))


def start_near_full_precision(model: nn.Module, start: Start) -> None:
    """Give every low-rank layer of `model` its start, one after another.

    Full-precision weights are read from the base's files, one at a time.

    Raises:
        ModelError: the files can't be read, or lack a layer.
    """
    wrapped: Any = model
    base = wrapped.get_base_model()
    weights = saved_weights(base)
    for name, layer in _low_rank_layers(base):
        weight = weights.read(f"{name}.weight")
        plain = layer.get_base_layer()
        turned = getattr(plain, "transposed", False) or issubclass(
            getattr(plain, "source_cls", nn.Linear), Conv1D
        )
        weight = weight.t().contiguous() if turned else weight
        if weight.shape != (plain.out_features, plain.in_features):
            raise ModelError(
                f"the files hold '{name}' as {tuple(weight.shape)}, the model as"
                f" {(plain.out_features, plain.in_features)}; they must be those it was loaded from"
            )
        factors = layer.lora_A["default"], layer.lora_B["default"]
        rank = factors[0].weight.shape[0]
        first = first_packed(weight, rank) if start.kind == "lq-lora" else None
        found = decompose(weight, _roundtrip(plain), rank, start.iterations, first)
        _fill(factors, found, layer.scaling["default"])
        if found.packed is not weight:
            _pack(plain, found.packed)


def _low_rank_layers(base: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in base.named_modules():
        if isinstance(getattr(module, "lora_A", None), nn.ModuleDict) and "default" in module.lora_A:
            yield name.replace(".base_layer", ""), module


def _fill(factors: tuple[nn.Module, nn.Module], found: Decomposition, scaling: float) -> None:
    """Enter the factors, the method's scaling taken out; ranks beyond the matrix's own stay zero."""
    down, up = (factor.get_parameter("weight") for factor in factors)
    rank = found.down.shape[0]
    with torch.no_grad():
        down.zero_()
        up.zero_()
        down[:rank].copy_(found.down / scaling**0.5)
        up[:, :rank].copy_(found.up / scaling**0.5)


def _roundtrip(layer: Any) -> Roundtrip:
    """What the layer's own quantiser makes of a matrix."""
    if isinstance(layer, RoundedLinear):

        def rounded(weight: torch.Tensor) -> torch.Tensor:
            found = levels_of(weight, layer.levels)
            return unpacked(found.codes, found.scale, found.zero, layer.levels.bits)

        return rounded

    from bitsandbytes import functional  # an extra: only its own layers need it

    def four_bits(weight: torch.Tensor) -> torch.Tensor:
        fresh = _four_bits(layer, weight)
        unpacked_: torch.Tensor = functional.dequantize_4bit(fresh.data, fresh.quant_state)
        return unpacked_.float()

    return four_bits


def _four_bits(layer: Any, weight: torch.Tensor) -> Any:
    """A bitsandbytes parameter with the layer's own options."""
    from bitsandbytes.nn import Params4bit

    old, dtype = layer.weight, layer.weight.quant_state.dtype
    return Params4bit(
        weight.to(dtype),
        requires_grad=False,
        blocksize=old.blocksize,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=old.quant_storage,
        module=layer,
    ).to("cpu")


def _pack(layer: Any, weight: torch.Tensor) -> None:
    if isinstance(layer, RoundedLinear):
        layer.take(weight)
    else:
        layer.weight = _four_bits(layer, weight)
