"""Attach a PEFT method to a frozen base: one seed, one set of tensors; the global generator is left alone."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import nn

from fedpeft.config.sections import PeftSection
from fedpeft.errors import ModelError
from fedpeft.models.base_model import head_modules
from fedpeft.models.explicit_names import with_explicit_names
from fedpeft.models.loftq import loftq_problem, start_near_full_precision, start_of
from fedpeft.models.methods import Method, base_refusal, method_named, with_options
from fedpeft.models.offsite import Emulator, emulator_of, on_outer_layers
from fedpeft.models.options import build_config, validate_peft
from fedpeft.models.patterns import check_layer_numbers, check_matches
from fedpeft.models.probing import try_out
from fedpeft.models.quantization import quantization_of
from fedpeft.models.quiet import one_line, quiet
from fedpeft.models.starts import decomposition_of, keep_start
from fedpeft.models.targets import check_targets, default_targets, find_modules, fit_options

_TARGET_KEYS = ("target_modules", "feedforward_modules", "exclude_modules", "modules_to_save")

# The default said aloud: left unsaid, torch warns once when a sparse update (SHiRA's) is multiplied.
torch.sparse.check_sparse_tensor_invariants.disable()  # type: ignore[no-untyped-call]


def attach(
    base: nn.Module, section: PeftSection, *, task: str, seed: int, start_bytes: bytes = b""
) -> nn.Module:
    """Wrap `base` (changed in place) in the method of the section; return it in evaluation mode.

    Trainable parameters are float32 whatever the base's dtype. A classifier's head, and what else `load_base`
    had to draw, is trained and saved with every method.

    Args:
        base: from `load_base`, on the CPU; one base serves one attachment.
        section: method and options.
        task: "causal-lm" or "sequence-classification".
        seed: of everything the method draws.
        start_bytes: `fedpeft.models.starts.start_of_model` of a model that starts as this one shall; empty:
            where one is needed, it is computed. Other starts have no use for it.

    Raises:
        ModelError: unknown method or option, target modules that are not in the model, a method that cannot
            work on this base (no biases, quantised, not float32), or values that `peft` refuses.
    """
    validate_peft(section, task)
    method = method_named(section.method)
    _check_base(with_options(method, section.options), base, task)
    problem = loftq_problem(section.method, section.options, quantization_of(base))
    if problem is not None:
        raise ModelError(problem)
    start = start_of(section.options)
    given = section.options
    if start is not None:  # ours, which `peft` must not try
        given = {
            key: value for key, value in given.items() if key not in ("init_lora_weights", "loftq_config")
        }
    config = build_config(method, _options(method, given, base, task), task)
    check_layer_numbers(base, section.options)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            model = peft.get_peft_model(base, config)
        except Exception as error:  # peft's tuners raise every kind for values they cannot use
            raise ModelError(f"peft.method '{method.name}' cannot be attached: {one_line(error)}") from error
    check_matches(model, section.options)
    _check_scaling(model)
    settle(model, method)
    if start is not None:
        known = decomposition_of(start_bytes) if start_bytes else None
        keep_start(model, start_near_full_precision(model, start, known))
        model.quantised_start = start  # an adapter folder says so
    attached: nn.Module = model.eval()
    try_out(attached, method.name)
    return attached


def _check_scaling(model: nn.Module) -> None:
    """Refuse an adapter that is multiplied by zero: it has no gradients, and a run would change nothing."""
    for name, module in model.named_modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and any(factor == 0 for factor in scaling.values()):
            raise ModelError(
                f"the adapter on {name.removeprefix('base_model.model.')} is scaled by 0, so that nothing"
                " would be learned; give peft.lora_alpha (and peft.alpha_pattern) values other than 0"
            )


def settle(model: nn.Module, method: Method) -> None:
    """Bring a freshly wrapped model into our form: what trains, in float32, with tied weights tied again.

    Raises:
        ModelError: one layer would hold weights of two dtypes, or nothing is left to train.
    """
    for name, parameter in model.named_parameters():
        if ".original_module." in name or not _trains(method, name):
            parameter.requires_grad_(False)
    if method.targets == "every-leaf":
        _tie_again(model)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    float_heads(model)
    for module in model.modules():
        _check_one_dtype(module)
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError(
            f"peft.method '{method.name}' leaves nothing to train on this model; choose other targets"
        )


def float_heads(model: nn.Module) -> None:
    """Hold the saved copies of whole modules (classification heads) in float32, and feed them so."""
    for module in model.modules():
        copies = getattr(module, "modules_to_save", None)
        if isinstance(copies, nn.ModuleDict):
            for head in copies.values():
                head.float()
                head.register_forward_pre_hook(_to_float32)


def _options(method: Method, given: dict[str, Any], base: nn.Module, task: str) -> dict[str, Any]:
    """Complete the run file's options: the method's defaults, targets, what fits the shapes, the head."""
    for key in _TARGET_KEYS:
        if given.get(key) is not None:
            check_targets(method, key, given[key], base)
    options = with_explicit_names(method, {**method.defaults, **method.fixed, **given}, base)
    if method.targets != "none" and options.get("target_modules") in (None, "all-linear"):
        options |= default_targets(method, base, task)
    emulator = emulator_of(base)
    if emulator is not None and method.targets != "none":
        options = _on_emulator(method, emulator, options, base)
    options = {**fit_options(method, base, options.get("target_modules", ())), **options}
    if task == "sequence-classification":
        options["modules_to_save"] = sorted({*(options.get("modules_to_save") or ()), *head_modules(base)})
    return options


def _on_emulator(
    method: Method, emulator: Emulator, options: dict[str, Any], base: nn.Module
) -> dict[str, Any]:
    """Targets by their full names, those of the emulator's outer layers alone."""
    names = on_outer_layers(emulator, find_modules(base, options.get("target_modules")))
    if method.targets == "every-leaf":  # Xiao et al. train layers, and no embeddings
        names = [name for name in names if emulator.layer_of(name) is not None]
    narrowed = {**options, "target_modules": names}
    if options.get("feedforward_modules"):
        inner = set(find_modules(base, options["feedforward_modules"]))
        narrowed["feedforward_modules"] = [name for name in names if name in inner]
    return narrowed


def _check_base(method: Method, base: nn.Module, task: str) -> None:
    kind = quantization_of(base)
    refusal = base_refusal(method, kind)
    if refusal is not None:
        raise ModelError(f"peft.method '{method.name}' is refused on {_article(kind)} base: {refusal}")
    if method.virtual_tokens and task == "sequence-classification" and hasattr(base, "score"):
        raise ModelError(
            f"peft.method '{method.name}' is refused on a decoder that classifies: behind virtual tokens it "
            "cannot tell padding, and would classify by a padded position; choose prefix or lora"
        )
    heads = head_modules(base)
    if method.needs_bias and not any(
        name.endswith("bias") and not name.startswith(heads) for name, _ in base.named_parameters()
    ):
        raise ModelError(
            f"peft.method '{method.name}' trains biases, and this model has none; choose another method"
        )
    low = {
        str(p.dtype).removeprefix("torch.")
        for p in base.parameters()
        if p.dtype in (torch.bfloat16, torch.float16)
    }
    if kind != "none" and low and not method.quantized_bfloat16:
        raise ModelError(
            f"peft.method '{method.name}' mixes dtypes on a {kind} base in {min(low)}; "
            "set model.dtype 'float32'"
        )
    if method.trains_base_tensors and low:
        raise ModelError(
            f"peft.method '{method.name}' trains the base's own weights, which are {min(low)} here; "
            "set model.dtype 'float32'"
        )


def _article(kind: str) -> str:
    return "a full-precision" if kind == "none" else f"a {kind}"


def _trains(method: Method, name: str) -> bool:
    if ".modules_to_save." in name:
        return True
    if method.trained == "not-a":
        return ".lora_A." not in name and ".lora_embedding_A." not in name
    if method.trained == "biases":
        return ".lora_" not in name
    return True


def _tie_again(model: nn.Module) -> None:
    """Let the trained copies of tied weights be one parameter, as the weights they copy are one."""
    owners: dict[int, nn.Module] = {}
    for module in model.modules():
        copies = getattr(module, "ln_tuning_layers", None)
        if not isinstance(copies, nn.ModuleDict):
            continue
        source, copy = module.get_submodule("base_layer"), copies["default"]
        weight = getattr(source, "weight", None)
        if weight is None:
            continue
        first = owners.setdefault(id(weight), copy)
        if first is not copy:
            copy.weight = first.weight


def _to_float32(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Feed a float32 head from a body of another dtype."""
    return tuple(a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)


def _check_one_dtype(module: nn.Module) -> None:
    dtypes = {p.dtype for p in module.parameters(recurse=False) if p.dtype.is_floating_point}
    trained = any(p.requires_grad for p in module.parameters(recurse=False))
    if trained and len(dtypes) > 1:
        raise ModelError(
            "peft.bias trains float32 biases beside weights of another dtype; set model.dtype 'float32'"
        )
