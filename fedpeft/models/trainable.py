"""The wire state of a model: its trainable parameters by name, and a digest of everything else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from fedpeft.errors import ModelError
from fedpeft.models.rounded_linear import RoundedLinear
from fedpeft.updates.packed import PackedArrays, Packing, packing_of

_CHUNK_BYTES = 1 << 24


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require gradients, by full name, names sorted; a shared one appears once."""
    return dict(sorted((name, p) for name, p in model.named_parameters() if p.requires_grad))


class PackedParameters(dict[str, nn.Parameter]):
    """Trainable parameters by name whose values lie side by side in one tensor.

    They are the model's own parameters, so training changes the tensor and writing the tensor changes the
    model: a state is entered and a change is read by one operation instead of one for each parameter.

    Attributes:
        flat: float32 [packing.size].
        packing: which part of it is which parameter.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], flat: torch.Tensor, packing: Packing) -> None:
        super().__init__(parameters)
        self.flat = flat
        self.packing = packing
        self._views = [parameter for parameter in self.values() if parameter.numel()]
        self._places = self._addresses()

    @property
    def whole(self) -> bool:
        """Whether every parameter still lies in `flat`; one whose `data` was replaced doesn't."""
        return self._addresses() == self._places

    def _addresses(self) -> list[int]:
        return [*map(torch.Tensor.data_ptr, self._views)]


def pack_parameters(parameters: Mapping[str, nn.Parameter]) -> Mapping[str, nn.Parameter]:
    """Move the values of `parameters` into one tensor, the parameters becoming views of it.

    Only float32 parameters of one device can be packed; others are returned as they are. The values don't
    change, and the old storage of each parameter is given up as soon as it is copied.
    """
    kinds = {(parameter.dtype, parameter.device) for parameter in parameters.values()}
    if len(kinds) != 1 or next(iter(kinds))[0] != torch.float32:
        return parameters
    packing = packing_of({name: (tuple(p.shape), "<f4") for name, p in parameters.items()})
    flat = torch.empty(packing.size, dtype=torch.float32, device=next(iter(kinds))[1])
    for name, span in packing.spans.items():
        view = flat[span.start : span.end].view(span.shape)
        view.copy_(parameters[name].detach())
        parameters[name].data = view
    return PackedParameters({name: parameters[name] for name in packing}, flat, packing)


def get_arrays(model: nn.Module) -> Mapping[str, np.ndarray]:
    """Return copies of the trainable parameters as float32 arrays, names sorted."""
    return read_parameters(trainable_parameters(model))


@contextmanager
def resting(parameters: Mapping[str, nn.Parameter], moved: Set[str]) -> Iterator[Mapping[str, nn.Parameter]]:
    """Let only the parameters named in `moved` require gradients, and return them; then all again."""
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in moved)
    try:
        yield {name: parameter for name, parameter in parameters.items() if name in moved}
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(True)


def read_parameters(parameters: Mapping[str, nn.Parameter]) -> Mapping[str, np.ndarray]:
    """Return copies of `parameters` as float32 arrays.

    Walking a model for its parameters takes longer than copying a small adapter, so who exchanges often looks
    them up once.
    """
    if isinstance(parameters, PackedParameters) and parameters.whole:
        return PackedArrays(_host(parameters.flat).copy(), parameters.packing)
    return {name: _host(parameter).copy() for name, parameter in parameters.items()}


def changes(
    parameters: Mapping[str, nn.Parameter], start: Mapping[str, np.ndarray]
) -> Mapping[str, np.ndarray]:
    """Return parameter minus `start` for each parameter, one float32 rounding per entry.

    Args:
        start: float32 arrays with the parameters' names and shapes.
    """
    if isinstance(start, PackedArrays) and (flat := _flat(parameters, start.packing)) is not None:
        return PackedArrays(_host(flat) - start.flat, start.packing)
    return {name: _host(parameter) - start[name] for name, parameter in parameters.items()}


def _flat(parameters: Mapping[str, nn.Parameter], packing: Packing) -> torch.Tensor | None:
    """The one tensor of parameters that are packed like this."""
    packed = isinstance(parameters, PackedParameters) and parameters.packing == packing and parameters.whole
    return parameters.flat if packed else None  # type: ignore[attr-defined]  # what `packed` says


def _host(tensor: torch.Tensor) -> np.ndarray:
    """The tensor as a float32 array; a view of it where it lies on the CPU in that type."""
    array: np.ndarray = tensor.detach().to(device="cpu", dtype=torch.float32).numpy()
    return array


def set_arrays(model: nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Copy `arrays` into the trainable parameters in place; see `write_parameters`."""
    write_parameters(trainable_parameters(model), arrays)


def write_parameters(parameters: Mapping[str, nn.Parameter], arrays: Mapping[str, np.ndarray]) -> None:
    """Copy `arrays` into `parameters` in place; names and shapes must match exactly.

    Nothing is written unless everything fits.

    Raises:
        ModelError: a name is missing or unknown, or a shape differs.
    """
    if isinstance(arrays, PackedArrays) and (flat := _flat(parameters, arrays.packing)) is not None:
        _copy(arrays.flat, flat)
        return
    for name in sorted(parameters.keys() ^ arrays.keys()):
        kind = "misses" if name in parameters else "has an unknown"
        raise ModelError(
            f"the state {kind} array '{name}'; it must come from the same model and [peft] section"
        )
    for name, parameter in parameters.items():
        if parameter.shape != arrays[name].shape:
            raise ModelError(
                f"array '{name}' has shape {arrays[name].shape}, the model needs {tuple(parameter.shape)}; "
                "it must come from the same model and [peft] section"
            )
    for name, parameter in parameters.items():
        _copy(np.ascontiguousarray(arrays[name], dtype=np.float32), parameter)


def _copy(source: np.ndarray, tensor: torch.Tensor) -> None:
    """Copy a float32 array into a tensor of its shape."""
    with torch.no_grad():
        if tensor.device.type == "cpu" and tensor.dtype == torch.float32:
            np.copyto(tensor.detach().numpy(), source)
        else:  # a read-only array (a memory map, say) cannot back a tensor without a warning
            tensor.copy_(torch.from_numpy(source if source.flags.writeable else source.copy()))


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return (trainable, all) parameters; a packed weight counts its logical elements, scales count none."""
    packed = {
        id(module.weight): module.in_features * module.out_features
        for module in model.modules()
        if isinstance(module, RoundedLinear)
    }
    sizes = [(packed.get(id(p), _logical_size(p)), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


def digest_frozen(model: nn.Module) -> str:
    """Return the SHA-256 (hex) over all frozen parameters and persistent buffers.

    Each tensor enters with its name, dtype, shape and bytes, in the order of names. The scales of quantised
    weights are included, and so is every other tensor that a tuner keeps (drawn matrices, positions, masks),
    saved or not; the base's non-persistent buffers (rotary tables, position ids) are recomputed on each
    machine and are not.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_iterate_frozen(model), key=lambda item: item[0]):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        for chunk in _chunks(tensor):
            digest.update(chunk)
    return digest.hexdigest()


def _iterate_frozen(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            yield dot + name, parameter.detach()
            yield from _quantisation_state(dot + name, module, parameter)
        tuner = hasattr(module, "adapter_layer_names") or type(module).__name__ == "BufferDict"
        for name, buffer in module.named_buffers(recurse=False):
            if tuner or name not in module._non_persistent_buffers_set:
                yield dot + name, buffer.detach()
        if tuner:
            yield from _plain_tensors(dot, module)


def _plain_tensors(dot: str, module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that a tuner's layer keeps outside of parameters and buffers, alone or by adapter."""
    for name, value in vars(module).items():
        if isinstance(value, torch.Tensor):
            yield dot + name, value
        elif isinstance(value, dict) and not name.startswith("_"):
            for key, item in value.items():
                if isinstance(item, torch.Tensor):
                    yield f"{dot}{name}.{key}", item


def _quantisation_state(
    name: str, module: nn.Module, parameter: nn.Parameter
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the scales beside a packed weight; bitsandbytes moves 8-bit ones to the layer when used."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        for key, value in state.as_dict(packed=True).items():
            yield f"{name}.{key}", value.detach()
    scales = getattr(parameter, "SCB", None)
    if scales is None and name.endswith("weight"):
        scales = getattr(getattr(module, "state", None), "SCB", None)
    if isinstance(scales, torch.Tensor):
        yield f"{name}.SCB", scales.detach()


def _logical_size(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    shape = getattr(state, "shape", None)
    return int(torch.Size(shape).numel()) if shape is not None else parameter.numel()


def _chunks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in pieces, row-major, without copying what is contiguous already."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0).byte()
    for start in range(0, flat.numel(), _CHUNK_BYTES):
        yield flat[start : start + _CHUNK_BYTES].cpu().numpy().data
