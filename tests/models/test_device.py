"""Where models compute: names of devices, and models that are there with everything they hold.

Without a GPU a move is seen in two ways. On torch's "meta" device nothing has values, so what is left behind
is found by looking. Fake tensors (`torch._subclasses`) have a device that any can be claimed to be, and every
operation between two devices is refused as a GPU would: "lazy" is one that a torch for the CPU knows by name.
"""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fedpeft.config.sections import ModelSection, PeftSection
from fedpeft.errors import ModelError
from fedpeft.models.attach import attach
from fedpeft.models.base_model import load_base
from fedpeft.models.device import (
    CPU,
    device_named,
    device_of,
    full_memory_refused,
    move,
    peak_memory,
    release,
)
from fedpeft.models.methods import METHODS
from fedpeft.models.trainable import trainable_parameters
from tests.models.tiny import TASKS, batch, saved, tiny_base

META, ELSEWHERE = torch.device("meta"), torch.device("lazy:0")
FAST = {"lora", "vera", "prefix", "fourierft", "ssf", "bitfit"}
READS_VALUES = {"loha", "lokr", "vblora", "waveft"}  # in their forward pass: fake tensors have none
SPARSE = {"shira"}  # there are no sparse fake tensors of such a device
CASES = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
    for name, method in METHODS.items()
    if not method.needs_quantization and name not in READS_VALUES | SPARSE
]


def attached(name: str) -> nn.Module:
    kind = "bert" if METHODS[name].needs_bias else "llama"
    return attach(tiny_base(kind), PeftSection(method=name), task=TASKS[kind], seed=1)


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything that a model keeps, scales and plain attributes included."""
    found: dict[str, torch.Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                found[f"{path}.{name}"] = value
    for name, parameter in model.named_parameters():
        state: Any = getattr(parameter, "quant_state", None)
        if state is not None:
            held = {"absmax": state.absmax, "code": state.code, "nested": state.state2.absmax}
            found |= {f"{name}.{key}": tensor for key, tensor in held.items()}
        scales = getattr(parameter, "SCB", None)
        if isinstance(scales, torch.Tensor):
            found[f"{name}.SCB"] = scales
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_cuda_there_is_the_cpu_and_a_refusal() -> None:
    assert device_named("auto") == device_named("cpu") == CPU
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ModelError, match=f"device '{name}'.*choose 'cpu' or 'auto'") as refusal:
            device_named(name)
        assert "\n" not in str(refusal.value)
    release()
    assert peak_memory(CPU) is None


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "CPU"])
def test_other_names_are_refused_with_the_run_file(name: str) -> None:
    with pytest.raises(ValueError, match="use 'auto', 'cpu', 'cuda' or 'cuda:N'"):
        ModelSection(device=name)


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward_need_nothing_that_stayed_behind(name: str) -> None:
    model = attached(name)
    names = list(trainable_parameters(model))
    ids = batch("llama")["input_ids"]
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert move(model, ELSEWHERE) is model
        assert device_of(model) == ELSEWHERE
        assert list(trainable_parameters(model)) == names
        model.train()
        moved = ids.to(ELSEWHERE)
        out = model(input_ids=moved, attention_mask=torch.ones_like(moved)).logits
        out.float().sum().backward()
    gradients = [p.grad for p in trainable_parameters(model).values() if p.grad is not None]
    assert gradients
    assert {gradient.device for gradient in gradients} == {ELSEWHERE}


def test_one_tensor_that_stays_behind_is_noticed() -> None:
    model = attached("lora")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        move(model, ELSEWHERE)
        path = next(name for name, _ in model.named_parameters() if ".lora_A." in name).rpartition(".")[0]
        model.get_submodule(path).weight = nn.Parameter(torch.zeros(8, 32))
        with pytest.raises(RuntimeError, match=r"same device|two different devices"):
            model(input_ids=batch("llama")["input_ids"].to(ELSEWHERE))


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "rtn8", "rtn4"])
def test_codes_and_scales_of_a_quantised_base_go_together(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra 'quant'")
    section = ModelSection.model_validate({"path": str(saved("llama", tmp_path)), "quantization": kind})
    model = attach(load_base(section), PeftSection(method="lora"), task="causal-lm", seed=1)
    before = tensors(model)
    assert {tensor.device for tensor in before.values()} == {CPU}
    after = tensors(move(model, META))
    assert {tensor.device for tensor in after.values()} == {META}
    assert {n: (t.shape, t.dtype) for n, t in after.items()} == {
        n: (t.shape, t.dtype) for n, t in before.items()
    }


def test_tied_weights_stay_one_and_the_cpu_keeps_nothing() -> None:
    model = attached("full")  # of a model whose head is its embedding
    old = {name: weakref.ref(parameter) for name, parameter in model.named_parameters()}
    count, distinct = len(tensors(model)), {id(parameter) for parameter in model.parameters()}
    move(model, META)
    gc.collect()
    assert len(tensors(model)) == count
    assert len({id(parameter) for parameter in model.parameters()}) == len(distinct)
    assert [name for name, there in old.items() if there() is not None] == []


def test_the_cpu_is_where_models_are_already() -> None:
    model = attached("lora")
    before = tensors(model)
    after = tensors(move(model, CPU))
    assert all(after[name] is tensor for name, tensor in before.items())


def test_a_full_device_is_one_line_with_what_helps() -> None:
    told = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB\nof which"
    with (
        pytest.raises(ModelError, match=r"memory is full \(Tried to allocate 2\.00 GiB\); lower") as refusal,
        full_memory_refused(),
    ):
        raise torch.OutOfMemoryError(told)
    assert "\n" not in str(refusal.value)
