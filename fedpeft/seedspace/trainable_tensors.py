"""The trainable tensors of a torch module, under canonical names."""

from collections.abc import Mapping

import torch
from torch import nn

from fedpeft.errors import ModelError
from fedpeft.seedspace.layout import CounterStream, canonical_names
from fedpeft.seedspace.perturb import perturb


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters with `requires_grad`, once each: a tied weight appears under its smallest name."""
    named = dict(model.named_parameters(remove_duplicate=False))
    canonical = canonical_names({name: id(parameter) for name, parameter in named.items()})
    return {
        name: parameter
        for name, parameter in named.items()
        if parameter.requires_grad and canonical[name] == name
    }


def trainable_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """What a `SeedSpace` over this model's trainable set is made of."""
    return {name: tuple(parameter.shape) for name, parameter in trainable_parameters(model).items()}


def ids_by_identity(model: nn.Module, ids: Mapping[str, int]) -> dict[int, int]:
    """Tensor id by `id(parameter)`, for the parameters named by `ids`.

    Raises: ModelError when the model's trainable set is another one.
    """
    parameters = trainable_parameters(model)
    different = sorted(parameters.keys() ^ ids.keys())
    if different:
        raise ModelError(
            f"{len(different)} trainable tensors differ between model and run, {different[0]!r} first: "
            "build both from one run file"
        )
    return {id(parameter): ids[name] for name, parameter in parameters.items()}


def materialise(
    model: nn.Module, ids: Mapping[str, int], stream: CounterStream, direction: int, scale: float
) -> dict[str, torch.Tensor]:
    """Perturbed copies of all trainable tensors, by every name they have: for `torch.func.functional_call`.

    Costs the memory of the trainable set; the just-in-time form is `jit_perturb`.
    """
    tensor_ids = ids_by_identity(model, ids)
    copies: dict[int, torch.Tensor] = {}
    result = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in tensor_ids:
            if id(parameter) not in copies:
                copies[id(parameter)] = perturb(
                    stream, tensor_ids[id(parameter)], direction, parameter.detach(), scale
                )
            result[name] = copies[id(parameter)]
    return result
