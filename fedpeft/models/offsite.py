"""Offsite tuning: clients train the first and last layers of a model whose middle they never see.

The owner of a model makes an emulator: a model folder with the first and last `pad` layers, and between them
a few of the others at even distances, which may then be distilled. Clients load it as they load any base and
train an adapter on the outer layers; the owner plugs the adapter into the full model. The emulator's
`config.json` says which layers it has.

Source: Xiao, Lin, Han 2023, "Offsite-Tuning: Transfer Learning without Full Model" (arXiv 2302.04870),
sections 3.2 and 3.3. There the outer layers' own weights are trained; here it is any adapter on them
(peft.method 'full' is theirs). The middle's weights are what is protected, not the clients' rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from fedpeft.errors import ModelError
from fedpeft.models.checkpoint_files import weights_digest
from fedpeft.models.quiet import one_line, quiet

__all__ = [
    "NO_EMULATOR",
    "Emulator",
    "check_source",
    "choose_layers",
    "emulator_at",
    "emulator_of",
    "make_emulator",
    "on_outer_layers",
    "plug_in",
    "save_emulator",
    "whole_model",
]

_KEY = "fedpeft_offsite"
_ADAPTER_CONFIG, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PER_LAYER = ("layer_types",)  # lists in a configuration with an item for each layer
NO_EMULATOR = "the base is no emulator; make one with: fedpeft emulator BASE --out DIR"


@dataclass(frozen=True)
class Emulator:
    """Which layers of a model an emulator has.

    Attributes:
        layers: dotted name of the list of layers.
        kept: for each layer of the emulator, its number in the full model; ascending.
        pad: so many first and last layers are trained.
        depth: layers of the full model.
        source: SHA-256 (hex) of the full model's weights.
        distilled: steps of distillation.
    """

    layers: str
    kept: tuple[int, ...]
    pad: int
    depth: int
    source: str
    distilled: int = 0

    @property
    def outer(self) -> frozenset[int]:
        """Numbers, in the emulator, of the layers that are trained."""
        count = len(self.kept)
        return frozenset([*range(self.pad), *range(count - self.pad, count)])

    def layer_of(self, name: str) -> int | None:
        """Number of the emulator's layer that a module or tensor lies in."""
        found = self._place.search(name)
        return None if found is None else int(found[2])

    def in_full_model(self, name: str) -> str:
        """The name in the full model of what has this name in the emulator."""
        return self._place.sub(lambda found: f"{found[1]}{self.kept[int(found[2])]}{found[3]}", name)

    @property
    def _place(self) -> re.Pattern[str]:
        return re.compile(rf"((?:^|\.){re.escape(self.layers)}\.)(\d+)(\.|$)")


def choose_layers(depth: int, *, pad: int, middle: int) -> tuple[int, ...]:
    """The outer layers and so many of the others, evenly spaced from the first to the last of these.

    Raises:
        ModelError: there are not so many.
    """
    inner = depth - 2 * pad
    if pad < 1 or not 1 <= middle <= inner:
        raise ModelError(
            f"the model has {depth} layers; {pad} outer ones on each side and {middle} between came, and at"
            " least one of each is needed and no more than there are"
        )
    stride = (inner - 1) / max(middle - 1, 1)
    first = 0.0 if middle > 1 else (inner - 1) / 2
    between = [pad + round(first + i * stride) for i in range(middle)]
    return (*range(pad), *between, *range(depth - pad, depth))


def whole_model(path: str, task: str) -> nn.Module:
    """A model as its files have it, without any head of a classifier, frozen.

    Raises:
        ModelError: it cannot be loaded.
    """
    kind = AutoModelForCausalLM if task == "causal-lm" else AutoModel
    with quiet():
        try:
            model = kind.from_pretrained(
                path, local_files_only=Path(path).is_dir(), trust_remote_code=False, use_safetensors=True
            )
        except Exception as error:  # broken files raise all kinds
            raise ModelError(f"no model can be loaded from '{path}': {one_line(error)}") from error
    loaded: nn.Module = model.requires_grad_(False).eval()
    return loaded


def make_emulator(model: nn.Module, out: Path, *, path: str, pad: int, middle: int) -> Emulator:
    """Take layers out of a model (which is used up) and write what is left as a model folder.

    Args:
        path: folder or hub name that the model is from.

    Raises:
        ModelError: the layers cannot be found, or there are too few.
    """
    wrapped: Any = model
    name, layers = _layer_list(model)
    kept = choose_layers(len(layers), pad=pad, middle=middle)
    emulator = Emulator(name, kept, pad, len(layers), weights_digest(path))
    model.set_submodule(name, nn.ModuleList(layers[number] for number in kept))
    config = wrapped.config
    config.num_hidden_layers = len(kept)
    for key in _PER_LAYER:
        values = getattr(config, key, None)
        if isinstance(values, list) and len(values) == emulator.depth:
            setattr(config, key, [values[number] for number in kept])
    save_emulator(model, out, emulator)
    return emulator


def save_emulator(model: nn.Module, out: Path, emulator: Emulator) -> None:
    """Write an emulator's weights and configuration into a folder, over those that are there."""
    wrapped: Any = model
    setattr(wrapped.config, _KEY, asdict(emulator))
    with quiet():
        wrapped.save_pretrained(out)


def emulator_of(base: nn.Module) -> Emulator | None:
    """What a loaded base is the emulator of; None if it is none."""
    return _read(getattr(getattr(base, "config", None), _KEY, None))


def emulator_at(folder: Path) -> Emulator | None:
    """As `emulator_of`, from a model folder's configuration."""
    try:
        table = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return _read(table.get(_KEY) if isinstance(table, dict) else None)


def on_outer_layers(emulator: Emulator, names: Iterable[str]) -> list[str]:
    """Those of some modules that an adapter may lie on: in outer layers, or in none.

    Raises:
        ModelError: none of them.
    """
    found = [n for n in names if (number := emulator.layer_of(n)) is None or number in emulator.outer]
    if not found:
        raise ModelError(
            "peft.target_modules names no module of the emulator's outer layers, which alone are trained;"
            " leave it out, or name modules by their last part"
        )
    return found


def plug_in(adapter: Path, out: Path, emulator: Emulator, *, base_name: str) -> None:
    """Write an adapter that was trained on an emulator as one of the full model.

    Raises:
        ModelError: it is no adapter, or lies on layers that are not plugged in.
    """
    try:
        config = json.loads((adapter / _ADAPTER_CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(adapter / _ADAPTER_WEIGHTS)
    except (OSError, ValueError) as error:
        raise ModelError(f"'{adapter}' is no adapter folder: {one_line(error)}") from error
    for name in tensors:
        number = emulator.layer_of(name)
        if number is not None and number not in emulator.outer:
            raise ModelError(
                f"the adapter holds '{name}', in a layer that stands for several; train it on the emulator's"
                " outer layers"
            )
    for key in ("target_modules", "feedforward_modules", "modules_to_save"):
        names = config.get(key)
        if isinstance(names, list):
            config[key] = sorted(emulator.in_full_model(name) for name in names)
    config["base_model_name_or_path"] = base_name
    out.mkdir(parents=True, exist_ok=True)
    renamed = {emulator.in_full_model(name): tensor for name, tensor in tensors.items()}
    save_file(renamed, out / _ADAPTER_WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (out / _ADAPTER_CONFIG).write_text(text, encoding="utf-8")


def check_source(emulator: Emulator, path: str) -> None:
    """Compare a full model with the one that the emulator was made from.

    Raises:
        ModelError: it is another.
    """
    found = weights_digest(path)
    if found != emulator.source:
        raise ModelError(
            f"'{path}' has weights {found[:12]}, and the emulator was made from {emulator.source[:12]}; give"
            " the model that it was made from"
        )


def _layer_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    wanted = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == wanted
    ]
    if len(lists) != 1:
        raise ModelError(
            f"the model has {len(lists)} lists of {wanted} layers, and one is needed; emulators are made of"
            " decoders and encoders of one stack"
        )
    return lists[0]


def _read(table: Any) -> Emulator | None:
    if not isinstance(table, Mapping):
        return None
    return Emulator(**{**table, "kept": tuple(table["kept"])})
