"""Adapter folders: write one, load one, merge one, name one by its digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from numpy.typing import NDArray
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from fedpeft.errors import ModelError, StorageError
from fedpeft.models.attach import float_heads
from fedpeft.models.loftq import start_near_full_precision
from fedpeft.models.methods import METHODS
from fedpeft.models.quantization import quantization_of
from fedpeft.models.quiet import one_line, quiet
from fedpeft.models.rounded_loading import dequantise

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_LOFTQ_KEY = "fedpeft_loftq_iter"
_UNMERGEABLE = frozenset(method.config for method in METHODS.values() if not method.mergeable)


def export_adapter(model: nn.Module, folder: Path, *, base_name: str) -> None:
    """Write the adapter into `folder` (made if missing) so that `peft.PeftModel.from_pretrained` loads it.

    One whose LoftQ start took several iterations fits a base with other codes than the plainly quantised one,
    and only `load_adapter` makes these again.

    The same state gives the same bytes. The folder holds the config and the weights only.

    Args:
        model: from `attach`.
        folder: where; the caller makes the write atomic.
        base_name: what the config says the adapter belongs to: a hub name, a folder, or "embedded".

    Raises:
        StorageError: the folder cannot be written.
    """
    # Cloned: safetensors refuses tensors that share memory, as tied ones do.
    tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in _adapter_state(model).items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        turns = int(getattr(model, "loftq_iterations", 0))
        (folder / CONFIG_FILE).write_text(_config_text(_config(model), base_name, turns), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"the adapter cannot be written to '{folder}': {one_line(error)}") from error


def load_adapter(base: nn.Module, folder: Path) -> nn.Module:
    """Put an exported adapter on a fresh base, frozen, for inference; says nothing on the terminal.

    Raises:
        ModelError: no adapter there, or one that does not fit this base.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ModelError(
                f"'{folder}' is no adapter folder: {name} is missing; give the adapter/ folder of a run"
            )
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            model = peft.PeftModel.from_pretrained(base, str(folder), torch_device="cpu")
            float_heads(model)
            turns = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get(_LOFTQ_KEY, 0)
            if turns:
                start_near_full_precision(model, int(turns))
            state = load_file(folder / WEIGHTS_FILE)
            _check_names(_adapter_state(model).keys(), state.keys(), folder)
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
    _check_names(held.keys(), weights.keys(), Path("memory"))
    state = {name: torch.from_numpy(np.array(array)) for name, array in weights.items()}
    with quiet(), torch.no_grad():
        set_peft_model_state_dict(model, state)


def merge_adapter(model: nn.Module) -> nn.Module:
    """Fold the adapter into the base's weights and return the base; `model` is used up.

    Trained scales of a rounded base are folded in exactly, and what is returned has ordinary float32 layers.

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
            merged: nn.Module = dequantise(wrapped.merge_and_unload())
    except Exception as error:  # tuners raise every kind
        raise ModelError(f"the adapter of {name} cannot be merged: {one_line(error)}") from error
    return merged.requires_grad_(False).eval()


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


def _check_names(needed: AbstractSet[str], found: AbstractSet[str], folder: Path) -> None:
    """Refuse a file that lacks tensors or has strange ones; `peft` would go on with what it drew."""
    for name in sorted(needed ^ found):
        what = "lacks" if name in needed else "has a strange"
        raise ModelError(
            f"the adapter in '{folder}' does not fit this base model: its file {what} tensor '{name}'; "
            "give the base model and the whole folder of one run"
        )


def _config(model: nn.Module) -> Any:
    configs: Any = model.peft_config
    return configs["default"]


def _config_text(config: Any, base_name: str, loftq_iterations: int = 0) -> str:
    """Render the config as `peft` reads it, with sets in sorted order so that the bytes repeat."""
    values = config.to_dict()
    values["base_model_name_or_path"] = base_name
    values["inference_mode"] = True
    if loftq_iterations > 1:  # the base's codes were changed, and loading must change them again
        values[_LOFTQ_KEY] = loftq_iterations
    if values.get("modules_to_save"):
        values["modules_to_save"] = sorted(set(values["modules_to_save"]))
    return json.dumps(values, indent=2, sort_keys=True, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no place in an adapter config")
