"""LoftQ: a quantised base and low-rank factors that together start near the full-precision weights.

Alternates Q = quantise(W - s B A) and s B A = the best rank-r approximation of W - Q, from B A = 0, and keeps
the pair of the least error |W - Q - s B A|. After one iteration Q is the plainly quantised weight; each
further one changes the codes of the frozen base.

Source: Li et al. 2023, "LoftQ" (arXiv 2310.08659), algorithm 1; Guo et al. 2024, LQ-LoRA (arXiv 2311.12023),
algorithm 1, which stops once the error rises. Both return the last pair; we return the best. The codes are
those of the base's own quantiser.

Singular vectors take long, and their last bits depend on the machine: in a federation the server computes
them once. What it sends is small: a layer's factors, and those of the product that is taken out of its weight
before that is quantised. Each client packs its own weights with them, see `fedpeft.models.starts`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedpeft.errors import ModelError
from fedpeft.models.checkpoint_files import SavedWeights, find_saved_weights
from fedpeft.models.lqlora import largest_directions
from fedpeft.models.rounded_linear import RoundedLinear, levels_of, unpack

__all__ = [
    "KINDS",
    "STARTS",
    "Decomposition",
    "LoftqStart",
    "decompose",
    "loftq_problem",
    "start_near_full_precision",
    "start_of",
    "without",
]

KINDS = ("nf4", "fp4", "rtn8", "rtn4")
"""Quantisations whose layers can be packed anew."""

STARTS = {"loftq": 1, "lq-lora": 100}
"""Starts by the run file's name -> iterations that it takes at most, unless told."""

METHODS = ("lora", "rslora", "ffa-lora")
_OPTION = "init_lora_weights"
_KEYS = frozenset({"loftq_iter"})

_CHUNK_ROWS = 1024

Roundtrip = Callable[[torch.Tensor], torch.Tensor]
Factors = tuple[torch.Tensor, torch.Tensor]
"""A product of low rank: (out, r) and (r, in), float32."""


@dataclass(frozen=True)
class Decomposition:
    """W is near quantise(W - removed) + up @ down.

    Attributes:
        up, down: (out, r) and (r, in), float32.
        removed: the product that is taken out before W is quantised; None: none.
        error: Frobenius norm of what is missing; NaN where others computed it.
    """

    up: torch.Tensor
    down: torch.Tensor
    removed: Factors | None
    error: float = math.nan


def without(weight: torch.Tensor, removed: Factors | None) -> torch.Tensor:
    """What is quantised: W less a product, float32 (out, in).

    The product is summed in float64 and rounded once, so that its bits are the same on machines that sum in
    another order.
    """
    if removed is None:
        return weight
    up, down = removed[0].double(), removed[1].double()
    rest = torch.empty_like(weight)
    for begin in range(0, len(weight), _CHUNK_ROWS):
        rows = slice(begin, begin + _CHUNK_ROWS)
        rest[rows] = weight[rows].double() - up[rows] @ down
    return rest


def decompose(
    weight: torch.Tensor,
    roundtrip: Roundtrip,
    rank: int,
    iterations: int,
    start: Factors | None = None,
) -> Decomposition:
    """Alternate; see the module.

    Args:
        weight: W (out, in), float32.
        roundtrip: quantises a matrix and unpacks it again.
        rank: of the factors, at most; of a smaller matrix its own.
        iterations: at least 1.
        start: what is taken out of W before it is quantised for the first time; default: nothing.
    """
    best: Decomposition | None = None
    removed = start
    for _ in range(iterations):
        residual = weight - roundtrip(without(weight, removed))
        left, sizes, right = torch.linalg.svd(residual, full_matrices=False)
        error = float(torch.linalg.vector_norm(sizes[rank:].double()))  # Eckart, Young 1936
        if best is not None and error >= best.error:
            break
        root = sizes[:rank].sqrt()
        best = Decomposition(left[:, :rank] * root, root[:, None] * right[:rank], removed, error)
        removed = best.up, best.down
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
class LoftqStart:
    """Which decomposition a model starts from, by the run file's name for it, and its most iterations."""

    kind: str
    iterations: int

    @property
    def keeps_codes(self) -> bool:
        """Whether the base stays as it is plainly quantised."""
        return self.kind == "loftq" and self.iterations == 1


def start_of(options: dict[str, Any]) -> LoftqStart | None:
    """What the options ask for, once `loftq_problem` found nothing wrong; None: no such start."""
    kind = options.get(_OPTION)
    if kind not in STARTS:
        return None
    return LoftqStart(kind, (options.get("loftq_config") or {}).get("loftq_iter", STARTS[kind]))


def start_near_full_precision(
    model: nn.Module, start: LoftqStart, known: Mapping[str, Decomposition] | None = None
) -> dict[str, Decomposition]:
    """Give every low-rank layer of `model` its start, one after another; what each was given, by name.

    Full-precision weights are read from the base's files, one at a time, where they are needed.

    Args:
        known: decompositions that were computed elsewhere.

    Raises:
        ModelError: the files can't be read, or lack a layer; what is known is of another model.
    """
    wrapped: Any = model
    base = wrapped.get_base_model()
    weights = find_saved_weights(base)
    layers = dict(_low_rank_layers(base))
    if known is not None and known.keys() != layers.keys():
        odd = min(known.keys() ^ layers.keys())
        raise ModelError(
            f"the start that came is of another model or other targets: '{odd}' is in one of them"
        )
    found = {}
    for name, layer in layers.items():
        plain, down = layer.get_base_layer(), layer.lora_A["default"]
        rank = min(down.weight.shape[0], plain.out_features, plain.in_features)
        needed = known is None or known[name].removed is not None
        weight = _full_precision(weights, name, plain) if needed else torch.empty(0)
        if known is None:
            first = largest_directions(weight, rank) if start.kind == "lq-lora" else None
            found[name] = decompose(weight, _roundtrip(plain), rank, start.iterations, first)
        else:
            found[name] = _fitting(known[name], name, plain, rank)
        _fill((down, layer.lora_B["default"]), found[name], layer.scaling["default"])
        if found[name].removed is not None:
            _pack(plain, without(weight, found[name].removed))
    return found


def _full_precision(weights: SavedWeights, name: str, layer: Any) -> torch.Tensor:
    """A layer's weight (out, in) as the files have it."""
    weight = weights.read(f"{name}.weight")
    turned = getattr(layer, "transposed", False) or issubclass(
        getattr(layer, "source_cls", nn.Linear), Conv1D
    )
    weight = weight.t().contiguous() if turned else weight
    if weight.shape != (layer.out_features, layer.in_features):
        raise ModelError(
            f"the files hold '{name}' as {tuple(weight.shape)}, the model as"
            f" {(layer.out_features, layer.in_features)}; they must be those it was loaded from"
        )
    return weight


def _fitting(known: Decomposition, name: str, layer: Any, rank: int) -> Decomposition:
    """A decomposition that came, if it is one of this layer."""
    wanted = (layer.out_features, rank), (rank, layer.in_features)
    for pair in ((known.up, known.down), known.removed):
        if pair is not None and tuple(tuple(factor.shape) for factor in pair) != wanted:
            raise ModelError(
                f"the start that came has factors of {tuple(pair[0].shape)} and {tuple(pair[1].shape)} for"
                f" '{name}', {wanted[0]} and {wanted[1]} are needed; it is of another model or rank"
            )
    return known


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
            return unpack(found.codes, found.scale, found.zero, layer.levels.bits)

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
