"""One contract for every PEFT method of the table: it attaches, trains, travels, exports and reloads."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn

from fedpeft.config.sections import PeftSection
from fedpeft.errors import ModelError
from fedpeft.models.attach import attach
from fedpeft.models.export import adapter_digest, export_adapter, load_adapter, merge_adapter
from fedpeft.models.methods import METHODS
from fedpeft.models.rounded_linear import Levels
from fedpeft.models.rounded_loading import round_layers
from fedpeft.models.trainable import digest_frozen, get_arrays, set_arrays, trainable_parameters
from tests.models.tiny import TASKS, batch, logits, tiny_base

HEADS = ("lm_head", "score", "classifier", "bert.pooler.dense")
SLOW = pytest.mark.slow
CASES = [
    pytest.param(name, kind, id=f"{name}-{kind}", marks=() if kind == light else SLOW)
    for name, method in METHODS.items()
    for light in ["bert" if method.needs_bias else "llama"]
    for kind in ("llama", "bert", "llama-classifier")
    if TASKS[kind] in method.tasks
    and not (method.needs_bias and kind != "bert")
    and not (method.virtual_tokens and kind == "llama-classifier")
]
each_method = pytest.mark.parametrize(("name", "kind"), CASES)


def base_for(name: str, kind: str) -> nn.Module:
    """A tiny model such as the method is made for."""
    base = tiny_base(kind)
    return round_layers(base, Levels(4), HEADS) if METHODS[name].needs_quantization else base


def attached(name: str, kind: str, seed: int = 5) -> nn.Module:
    return attach(base_for(name, kind), PeftSection(method=name), task=TASKS[kind], seed=seed)


def real_tokens(output: torch.Tensor, kind: str) -> torch.Tensor:
    """Leave out the positions of virtual tokens, which come first."""
    return output[:, -12:] if kind == "llama" else output


@dataclass(frozen=True)
class Trial:
    """A method attached and trained for three steps, with what was seen on the way."""

    model: nn.Module
    fresh_logits: torch.Tensor
    fresh_arrays: dict[str, np.ndarray]
    fresh_digest: str
    losses: list[float]
    ungraded: list[str]
    logits: torch.Tensor


@cache  # one training serves every test of a method
def trial(name: str, kind: str) -> Trial:
    model = attached(name, kind)
    fresh_logits, arrays, digest = logits(model, kind), dict(get_arrays(model)), digest_frozen(model)
    parameters = trainable_parameters(model)
    optimizer = torch.optim.Adam(parameters.values(), lr=0.001)
    losses: list[float] = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**batch(kind)).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    ungraded = [key for key, p in parameters.items() if p.grad is None]
    return Trial(model, fresh_logits, arrays, digest, losses, ungraded, logits(model, kind))


def test_the_table_holds_every_promised_method() -> None:
    promised = """lora rslora dora ffa-lora pissa olora ia3 prompt prefix p-tuning vera randlora oft boft miss
    ln-tuning loha lokr fourierft hra vblora shira c3a delora gralora hira bitfit head full bottleneck ssf
    peqa"""
    assert set(promised.split()) <= METHODS.keys()
    assert len(METHODS) == 41
    assert all(name == method.name for name, method in METHODS.items())


@each_method
def test_a_second_instance_of_the_seed_is_the_same_and_takes_the_trained_state(name: str, kind: str) -> None:
    before = torch.get_rng_state()
    again = attached(name, kind)
    assert torch.equal(before, torch.get_rng_state())
    assert digest_frozen(again) == trial(name, kind).fresh_digest
    arrays = get_arrays(again)
    expected = trial(name, kind).fresh_arrays
    assert arrays.keys() == expected.keys()
    assert all(np.array_equal(arrays[key], expected[key]) for key in arrays)
    set_arrays(again, get_arrays(trial(name, kind).model))
    assert torch.equal(logits(again, kind), trial(name, kind).logits)


@each_method
def test_a_fresh_adapter_starts_at_the_base_where_the_table_says_so(name: str, kind: str) -> None:
    base = logits(base_for(name, kind), kind)
    distance = float((real_tokens(trial(name, kind).fresh_logits, kind) - base).abs().max())
    assert (distance < 1e-6) == METHODS[name].starts_at_base


@each_method
def test_training_lowers_the_loss_and_moves_the_trainable_parameters_only(name: str, kind: str) -> None:
    seen = trial(name, kind)
    assert seen.losses[-1] < seen.losses[0]
    assert seen.ungraded == []
    assert digest_frozen(seen.model) == seen.fresh_digest
    assert all(p.dtype == torch.float32 for p in trainable_parameters(seen.model).values())
    now = get_arrays(seen.model)
    assert any(not np.array_equal(now[key], seen.fresh_arrays[key]) for key in now)


@each_method
def test_an_exported_adapter_gives_the_same_logits_through_peft_and_through_us(
    name: str, kind: str, tmp_path: Path
) -> None:
    seen = trial(name, kind)
    export_adapter(seen.model, tmp_path / "one", base_name="somewhere/else")
    export_adapter(seen.model, tmp_path / "two", base_name="somewhere/else")
    assert adapter_digest(tmp_path / "one") == adapter_digest(tmp_path / "two")
    ours = load_adapter(base_for(name, kind), tmp_path / "one")
    assert not trainable_parameters(ours)
    assert torch.equal(logits(ours, kind), seen.logits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's and transformers' advice to each other
        theirs = peft.PeftModel.from_pretrained(base_for(name, kind), str(tmp_path / "one"))
    assert torch.equal(logits(theirs, kind), seen.logits)


@pytest.mark.slow
@each_method
def test_merging_gives_the_same_function_or_is_refused(name: str, kind: str) -> None:
    copy = attached(name, kind)
    set_arrays(copy, get_arrays(trial(name, kind).model))
    if not METHODS[name].mergeable:
        with pytest.raises(ModelError, match="cannot be merged"):
            merge_adapter(copy)
        return
    merged = merge_adapter(copy)
    assert not isinstance(merged, peft.PeftModel)
    assert torch.allclose(logits(merged, kind), trial(name, kind).logits, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.mergeable])
def test_the_mean_of_parameters_is_the_mean_of_weights_where_the_table_says_so(name: str) -> None:
    kind = "bert" if METHODS[name].needs_bias else "llama"
    start = get_arrays(attached(name, kind))
    rng = np.random.default_rng(0)
    one, two = (
        {k: v + np.float32(0.1) * rng.normal(size=v.shape) for k, v in start.items()} for _ in range(2)
    )
    mean = {key: (one[key] + two[key]) / 2 for key in start}

    def weights(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        model = attached(name, kind)
        set_arrays(model, arrays)
        return {key: p.detach() for key, p in merge_adapter(model).named_parameters()}

    first, second, middle = weights(one), weights(two), weights(mean)
    spread = max(float((first[key] - second[key]).abs().max()) for key in first)
    error = max(float((middle[key] - (first[key] + second[key]) / 2).abs().max()) for key in first)
    assert (error < 1e-5 * spread) == METHODS[name].linear_in_trained


@pytest.mark.slow
@pytest.mark.parametrize("name", list(METHODS))
def test_what_a_method_draws_or_rewrites_is_declared(name: str) -> None:
    method = METHODS[name]
    kind = "bert" if method.needs_bias else "llama"
    model = attached(name, kind, seed=6)
    if digest_frozen(model) != trial(name, kind).fresh_digest:
        assert method.draws_frozen_tensors
    base = dict(base_for(name, kind).named_parameters())
    rewritten = [
        key
        for key, p in model.named_parameters()
        for plain in [
            key.replace("base_model.", "").replace("model.model.", "model.").replace(".base_layer", "")
        ]
        if plain in base and not p.requires_grad and not torch.equal(p, base[plain])
    ]
    assert bool(rewritten) == method.changes_base_at_init


@pytest.mark.slow
@pytest.mark.parametrize("name", list(METHODS))
def test_gradient_checkpointing_gives_the_same_gradients_where_the_table_allows_it(name: str) -> None:
    kind = "bert" if METHODS[name].needs_bias else "llama"

    def gradients(checkpointed: bool) -> dict[str, torch.Tensor | None]:
        base: Any = base_for(name, kind)
        if checkpointed:
            base.activation_checkpointing_enable({"use_reentrant": False})
            base.config.use_cache = False
        model = attach(base, PeftSection(method=name), task=TASKS[kind], seed=5).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model(**batch(kind)).loss.backward()
        return {key: p.grad for key, p in trainable_parameters(model).items()}

    if not METHODS[name].gradient_checkpointing:
        with pytest.raises(ModelError, match="cannot be attached"):
            gradients(checkpointed=True)
        return
    plain, cheap = gradients(checkpointed=False), gradients(checkpointed=True)
    for key, gradient in plain.items():
        other = cheap[key]
        assert gradient is not None
        assert other is not None
        assert torch.equal(gradient, other)
