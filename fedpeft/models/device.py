"""Which device a model computes on, and how a loaded one gets there.

Bases are read and quantised, adapters drawn and decompositions computed on the CPU, and only then moved,
tensor by tensor. So the start and the digest of everything frozen are the same whatever device follows, a
GPU never holds a full-precision weight of a quantised base, and devices of different kinds train in one run.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from fedpeft.errors import MemoryLimitError, ModelError

__all__ = [
    "CPU",
    "available_memory",
    "device_memory",
    "device_named",
    "device_of",
    "full_memory_refused",
    "move",
    "peak_memory",
    "release",
]

CPU = torch.device("cpu")
_MIB = 2**20
_CGROUPS = Path("/sys/fs/cgroup")  # of this very process, in a container


def device_named(name: str) -> torch.device:
    """What "auto", "cpu", "cuda" or "cuda:N" means here; "auto" is the first CUDA device, else the CPU.

    Raises:
        ModelError: there is no such device.
    """
    there = torch.cuda.device_count() if name != "cpu" and torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not there):
        return CPU
    number = int(name.partition(":")[2] or 0)
    if number < there:
        return torch.device("cuda", number)
    if there:
        last = f"cuda:{there - 1}"
        raise ModelError(f"device '{name}': the last CUDA device of this machine is '{last}'; choose another")
    if torch.version.cuda is None:
        raise ModelError(
            f"device '{name}': torch is installed for the CPU alone; choose 'cpu' or 'auto', or install a"
            " torch for CUDA"
        )
    raise ModelError(f"device '{name}': this machine has no CUDA device; choose 'cpu' or 'auto'")


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes; its parameters lie on one device."""
    return next(model.parameters()).device


def move(model: nn.Module, device: torch.device) -> nn.Module:
    """Bring a model that was loaded on the CPU to its device, in place; the model.

    Each tensor's copy on the CPU goes as soon as it is copied. Beside parameters and buffers these are the
    scales of quantised weights, and what tuners keep in plain attributes. Tied weights stay tied. Parameters
    become other objects: whoever holds the old ones looks them up again.
    """
    if device.type == "cpu":
        return model
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.set_device(device)  # where kernels are launched that don't look at their arguments
    done: dict[int, Any] = {}  # by the id of the old tensor: all of these are there before the first one goes

    def moved(tensor: Any, how: Callable[[Any], Any]) -> Any:
        """The same new tensor for the same old one, wherever it is met."""
        if tensor.device == device:
            return tensor
        if id(tensor) not in done:
            done[id(tensor)] = how(tensor)
        return done[id(tensor)]

    def there(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device)

    for module in model.modules():
        for name in module._parameters:
            if module._parameters[name] is not None:
                module._parameters[name] = moved(module._parameters[name], lambda p: _parameter(p, device))
        for name in module._buffers:
            if module._buffers[name] is not None:
                module._buffers[name] = moved(module._buffers[name], there)
        _move_plain(module, lambda tensor: moved(tensor, there))
        if hasattr(module, "hf_device_map"):  # what transformers remembers of how it loaded a quantised base
            module.hf_device_map = {"": device}  # type: ignore[assignment]  # no tensor nor module
    return model


def _parameter(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    """The parameter on the device, with whatever scales it carries."""
    if type(parameter) is not nn.Parameter:  # bitsandbytes' own kinds move their scales with them
        own: Any = parameter.to(device)
        return own  # type: ignore[no-any-return]  # torch says that it is a tensor
    return nn.Parameter(parameter.detach().to(device), requires_grad=parameter.requires_grad)


def _move_plain(module: nn.Module, moved: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """What a module keeps outside of parameters and buffers: alone, by name, in an 8-bit layer's state."""
    for name, value in list(vars(module).items()):
        if isinstance(value, torch.Tensor):
            setattr(module, name, moved(value))
        elif isinstance(value, dict) and not name.startswith("_"):
            for key, item in value.items():
                if isinstance(item, torch.Tensor):
                    value[key] = moved(item)
    state = getattr(module, "state", None)
    for name in ("CB", "SCB"):
        if isinstance(getattr(state, name, None), torch.Tensor):
            setattr(state, name, moved(getattr(state, name)))


def device_memory(device: torch.device) -> int:
    """Bytes that are free on a CUDA device."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free)


def available_memory(device: torch.device = CPU) -> int:
    """Bytes that this process may still take: what a GPU, the machine, or its container has left."""
    if device.type == "cuda":
        return device_memory(device)
    free = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUPS / "memory.max").read_text().strip()
        used = int((_CGROUPS / "memory.current").read_text())
        cached = dict(line.split() for line in (_CGROUPS / "memory.stat").read_text().splitlines())
        left = free if limit == "max" else int(limit) - used + int(cached.get("inactive_file", 0))
    except (OSError, ValueError):  # no such limits here
        return free
    return max(0, min(free, left))


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that tensors of this process took on a CUDA device; None for the CPU."""
    return None if device.type != "cuda" else int(torch.cuda.max_memory_allocated(device))


def release() -> None:
    """Give memory that nothing uses any more back to the GPU, for others on it."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def full_memory_refused() -> Iterator[None]:
    """Say on one line that a device's memory is full.

    Raises:
        MemoryLimitError: in place of torch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        release()
        asked = " ".join(str(error).split()).removeprefix("CUDA out of memory. ").partition(". ")[0]
        raise MemoryLimitError(
            f"the device's memory is full ({asked}); lower training.batch_size, set"
            " training.gradient_checkpointing, or quantise the base (model.quantization)"
        ) from error
