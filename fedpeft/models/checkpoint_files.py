"""Full-precision weights of a base model, read one at a time from the files that it was loaded from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import cached_file

from fedpeft.errors import ModelError
from fedpeft.models.quiet import one_line, quiet

__all__ = ["SavedWeights", "find_saved_weights", "note_source", "weights_digest"]

_SOURCE = "fedpeft_source"
_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def note_source(base: nn.Module, path: str) -> None:
    """Remember the folder or hub name that a base was loaded from."""
    setattr(base, _SOURCE, path)


class SavedWeights:
    """The tensors of a model's safetensors files, by name; nothing is held."""

    def __init__(self, files: dict[str, Path]) -> None:
        self._files = files

    def read(self, name: str) -> torch.Tensor:
        """The tensor of a parameter, in float32.

        Files may name parameters without the outermost module, or with one more.

        Raises:
            ModelError: no tensor, or several, could be meant, or the file is damaged.
        """
        fitting = [
            key for key in self._files if key == name or name.endswith(f".{key}") or key.endswith(f".{name}")
        ]
        found = [name] if name in self._files else fitting
        if len(found) != 1:
            raise ModelError(f"the model's files hold {len(found)} tensors for '{name}'; one is needed")
        try:
            with safe_open(self._files[found[0]], framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(found[0])
        except (OSError, SafetensorError) as error:
            raise ModelError(f"'{self._files[found[0]]}' cannot be read: {one_line(error)}") from error
        return tensor.float()


def find_saved_weights(base: nn.Module) -> SavedWeights:
    """Find the files that `load_base` read.

    Raises:
        ModelError: the base is from no files, or they are not safetensors.
    """
    path = getattr(base, _SOURCE, None)
    if path is None:
        raise ModelError("this start needs the full-precision weights; the base was not loaded from files")
    return SavedWeights(_files(path))


def _files(path: str) -> dict[str, Path]:
    """Tensor to the file that holds it."""
    index = _find(path, _INDEX)
    try:
        if index is not None:
            table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {key: _whole(path, name) for key, name in table.items()}
        one = _whole(path, _ONE)
        with safe_open(one, framework="pt") as file:
            return dict.fromkeys(file.keys(), one)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"the weights of '{path}' cannot be read: {one_line(error)}") from error


def weights_digest(path: str) -> str:
    """SHA-256 (hex) of the safetensors files of a folder or hub name, with their names.

    Raises:
        ModelError: there are none.
    """
    digest = hashlib.sha256()
    for file in sorted(set(_files(path).values())):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _whole(path: str, name: str) -> Path:
    found = _find(path, name)
    if found is None:
        raise ModelError(
            f"'{path}' has no {name}; this start reads safetensors files only, convert the model"
        )
    return found


def _find(path: str, name: str) -> Path | None:
    folder = Path(path)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    with quiet():
        cached = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    return None if cached is None else Path(cached)
