"""Adapter folders: write one, load one, merge one, name one by its digest."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from numpy.typing import NDArray
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from fedpeft.errors import ModelError, StorageError
from fedpeft.models.attach import float_heads
from fedpeft.models.frozen_products import get_frozen_products
from fedpeft.models.generation import save_settings
from fedpeft.models.loftq import Decomposition, LoftqStart, start_near_full_precision
from fedpeft.models.methods import METHODS
from fedpeft.models.quantization import quantization_of
from fedpeft.models.quiet import one_line, quiet
from fedpeft.models.rounded_loading import dequantise

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_LOFTQ_KEY, _START_KEY = "fedpeft_loftq_iter", "fedpeft_start"
_ACTED_ON = ("megatron_config", "tokenizer_name_or_path", "tokenizer_kwargs", "arrow_config")
_WRAPPED = "base_model.model."  # peft's way from its wrapper to the base's own modules
_UNMERGEABLE = frozenset(method.config for method in METHODS.values() if not method.mergeable)


def export_adapter(model: nn.Module, folder: Path, *, base_name: str) -> None:
    """Write the adapter into `folder` (made if missing) so that `peft.PeftModel.from_pretrained` loads it.

    Frozen products beside the adapter are stacked on its factors: one adapter of a higher rank, each module's
    its own. One whose LoftQ start took several iterations fits a base with other codes than the plainly
    quantised one, and only `load_adapter` makes these again.

    The same state gives the same bytes. The folder holds the config, the weights, and the
    generation settings of a model that has some, whose end tokens are those that rows end with.

    Args:
        model: from `attach`.
        folder: where; the caller makes the write atomic.
        base_name: what the config says the adapter belongs to: a hub name, a folder, or "embedded".

    Raises:
        StorageError: the folder cannot be written.
    """
    # Cloned: safetensors refuses tensors that share memory, as tied ones do.
    tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in _adapter_state(model).items()}
    patterns = _append_products(tensors, model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        start = getattr(model, "quantised_start", None)
        text = _config_text(_config(model), base_name, start, patterns)
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
        save_settings(model, folder)
    except OSError as error:
        raise StorageError(f"the adapter cannot be written to '{folder}': {one_line(error)}") from error


def load_adapter(
    base: nn.Module, folder: Path, known: Mapping[str, Decomposition] | None = None
) -> nn.Module:
    """Put an exported adapter on a fresh base, frozen, for inference; says nothing on the terminal.

    Args:
        known: decompositions of a start near full precision, from who computed them; None: computed anew.

    Raises:
        ModelError: no adapter there, or one that does not fit this base.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ModelError(
                f"'{folder}' is no adapter folder: {name} is missing; give the adapter/ folder of a run"
            )
    _refuse_config(folder)
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            model = peft.PeftModel.from_pretrained(base, str(folder), torch_device="cpu")
            float_heads(model)
            told = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
            if told.get(_LOFTQ_KEY):
                start = LoftqStart(str(told.get(_START_KEY, "loftq")), int(told[_LOFTQ_KEY]))
                start_near_full_precision(model, start, known)
            state = load_file(folder / WEIGHTS_FILE)
            _check_names(_adapter_state(model).keys(), state.keys(), folder, _embeddings(model))
            set_peft_model_state_dict(model, state)
    except ModelError:
        raise
    except Exception as error:  # peft, torch and json each raise their own kind on files that do not fit
        raise ModelError(
            f"the adapter in '{folder}' does not fit this base model: {one_line(error)}"
        ) from error
    model.requires_grad_(False)
    loaded: nn.Module = model.eval()
    return loaded


def _refuse_config(folder: Path) -> None:
    """Refuse a configuration by which `peft` would import a module, or fetch a tokenizer or other adapters.

    Raises:
        ModelError: it has such an option.
    """
    try:
        told = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the adapter in '{folder}' does not fit this base model: {one_line(error)}"
        ) from error
    for key in _ACTED_ON:
        if isinstance(told, dict) and told.get(key):
            raise ModelError(
                f"the adapter in '{folder}' sets {key}, by which files or code from elsewhere would be loaded"
                "; take it out of adapter_config.json if you trust what it names"
            )


def replace_adapter_weights(model: nn.Module, weights: Mapping[str, NDArray[np.float32]]) -> None:
    """Put other weights of the same configuration on a model that `load_adapter` gave.

    Raises:
        ModelError: tensors are missing, strange or of another shape.
    """
    held = _adapter_state(model)
    shapes = {name: array.shape for name, array in weights.items()}
    for name, tensor in held.items():
        if shapes.get(name, tensor.shape) != tuple(tensor.shape):
            raise ModelError(f"tensor '{name}' is {shapes[name]}, {tuple(tensor.shape)} is needed")
    _check_names(held.keys(), weights.keys(), Path("memory"), _embeddings(model))
    state = {name: torch.from_numpy(np.array(array)) for name, array in weights.items()}
    with quiet(), torch.no_grad():
        set_peft_model_state_dict(model, state)


def merge_adapter(model: nn.Module) -> nn.Module:
    """Fold the adapter into the base's weights and return the base; `model` is used up.

    Trained scales of a rounded base are folded in exactly, and what is returned has ordinary float32 layers.
    A layer whose weight another one shares (a tied output layer) gets its own, unless both end alike.

    Raises:
        ModelError: the method cannot be folded in, or the base is quantised.
    """
    wrapped: Any = model  # a PeftModel, which is untyped
    name = type(_config(model)).__name__
    if name in _UNMERGEABLE:
        raise ModelError(f"an adapter of {name} cannot be merged into the base; keep it as an adapter")
    kind = quantization_of(wrapped.get_base_model())
    if kind != "none" and name != "PEQAConfig":  # whose scales take the place of the base's, without rounding
        raise ModelError(
            f"merging into {kind} weights would round the adapter away; load the base with "
            "model.quantization 'none', put the exported adapter on it, and merge there"
        )
    try:
        with quiet(), torch.no_grad():
            _part_shared_weights(model)
            _put_copies_in_place(model)
            merged: nn.Module = dequantise(wrapped.merge_and_unload())
            _say_what_is_tied(merged)
    except Exception as error:  # tuners raise every kind
        raise ModelError(f"the adapter of {name} cannot be merged: {one_line(error)}") from error
    return merged.requires_grad_(False).eval()


def _part_shared_weights(model: nn.Module) -> None:
    """Give each adapted layer a weight of its own where another layer shares it: that one must stay."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            layer: Any = module.get_base_layer()
            weight = getattr(layer, "weight", None)
            if isinstance(weight, nn.Parameter) and holders.get(id(weight), 0) > 1:
                layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)


def _put_copies_in_place(model: nn.Module) -> None:
    """Let copies that were trained whole take their modules' places, whatever kind of module they are."""
    base: Any = model.get_base_model()  # type: ignore[operator]  # a PeftModel, which is untyped
    for name, module in list(base.named_modules()):
        if isinstance(module, LNTuningLayer):
            base.set_submodule(name, module.ln_tuning_layers["default"])


def _say_what_is_tied(merged: nn.Module) -> None:
    """Let a merged model's configuration say that input and output are tied only if they still are."""
    model: Any = merged
    config = model.config.get_text_config(decoder=True)
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if (
        output is None
        or not getattr(config, "tie_word_embeddings", False)
        or output.weight is embedding.weight
    ):
        return
    if torch.equal(output.weight, embedding.weight):
        output.weight = embedding.weight
    else:
        model.config.tie_word_embeddings = config.tie_word_embeddings = False


def adapter_digest(folder: Path) -> str:
    """Return the SHA-256 (hex) over the config and weight files of an exported adapter.

    Raises:
        ModelError: one of the files is missing.
    """
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        path = folder / name
        if not path.is_file():
            raise ModelError(
                f"'{folder}' is no adapter folder: {name} is missing; give the adapter/ folder of a run"
            )
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what an adapter file holds, by the names it has there, sorted."""
    with quiet(), torch.no_grad():
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
    # Frozen originals of saved modules belong to the base; bias="all" would sweep their biases in.
    return {name: t.detach() for name, t in sorted(state.items()) if ".original_module." not in name}


def _embeddings(model: nn.Module) -> set[str]:
    """Names under which `peft` may save the base's embedding and output layer beside an adapter."""
    base: Any = model.get_base_model()  # type: ignore[operator]  # a PeftModel, which is untyped
    layers = {id(base.get_input_embeddings()), id(base.get_output_embeddings())}
    held = (name for name, module in base.named_modules() if id(module) in layers)
    return {f"{_WRAPPED}{name}{inner}.weight" for name in held for inner in ("", ".base_layer")}


def _check_names(
    needed: AbstractSet[str], found: AbstractSet[str], folder: Path, allowed: AbstractSet[str]
) -> None:
    """Refuse a file that lacks tensors or has strange ones; `peft` would go on with what it drew.

    Args:
        allowed: what may be there beside what is needed.
    """
    for name in sorted(needed ^ (found - (allowed - needed))):
        what = "lacks" if name in needed else "has a strange"
        raise ModelError(
            f"the adapter in '{folder}' does not fit this base model: its file {what} tensor '{name}'; "
            "give the base model and the whole folder of one run"
        )


def _append_products(tensors: dict[str, torch.Tensor], model: nn.Module) -> dict[str, Any]:
    """Append the model's frozen products to the factors in `tensors`; what the config then says of ranks.

    A module of rank r and scaling s becomes one of rank r + K and the same s: A over Q, B beside P / s.
    """
    products, layers = get_frozen_products(model), dict(model.named_modules())
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, product in products.items():
        layer: Any = layers[name]
        scaling = layer.scaling["default"]
        a, b = (f"{name}.{factor}.weight" for factor in ("lora_A", "lora_B"))
        tensors[a] = torch.cat([tensors[a], torch.from_numpy(product.a.copy())], dim=0)
        tensors[b] = torch.cat([tensors[b], torch.from_numpy(product.b / scaling).float()], dim=1)
        rank, key = tensors[a].shape[0], name.removeprefix(_WRAPPED)
        ranks[key] = rank
        stable = bool(_config(model).use_rslora)
        alphas[key] = scaling * (math.sqrt(rank) if stable else rank)
    return {"rank_pattern": ranks, "alpha_pattern": alphas} if products else {}


def _config(model: nn.Module) -> Any:
    configs: Any = model.peft_config
    return configs["default"]


def _config_text(
    config: Any, base_name: str, start: LoftqStart | None = None, patterns: Mapping[str, Any] | None = None
) -> str:
    """Render the config as `peft` reads it, with sets in sorted order so that the bytes repeat."""
    values = config.to_dict() | dict(patterns or {})
    values["base_model_name_or_path"] = base_name
    values["inference_mode"] = True
    if start is not None and not start.keeps_codes:  # loading must change the base's codes again
        values |= {_LOFTQ_KEY: start.iterations, _START_KEY: start.kind}
    if values.get("modules_to_save"):
        values["modules_to_save"] = sorted(set(values["modules_to_save"]))
    return json.dumps(values, indent=2, sort_keys=True, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no place in an adapter config")
