"""LQ-LoRA starts: the low-rank part comes out first, and what is left loses less when it is quantised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedpeft.config.sections import ModelSection, PeftSection
from fedpeft.models.attach import attach
from fedpeft.models.base_model import load_base
from fedpeft.models.export import export_adapter, load_adapter
from fedpeft.models.loftq import decompose, loftq_problem, without
from fedpeft.models.lqlora import largest_directions
from fedpeft.models.rounded_linear import Levels, levels_of, unpack
from fedpeft.models.trainable import digest_frozen, get_arrays
from tests.models.tiny import logits, saved


def four_bits(weight: torch.Tensor) -> torch.Tensor:
    found = levels_of(weight, Levels(4, 8))
    return unpack(found.codes, found.scale, found.zero, 4)


def spiked(seed: int) -> torch.Tensor:
    """A matrix with a few large directions, for which the first step is made."""
    draws = torch.Generator().manual_seed(seed)
    noise = torch.randn(32, 24, generator=draws)
    return noise + 12 * torch.randn(32, 2, generator=draws) @ torch.randn(2, 24, generator=draws)


def test_the_first_step_takes_the_largest_directions_out() -> None:
    weight = spiked(0)
    left = without(weight, largest_directions(weight, 2))
    sizes = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    rest = np.linalg.svd(left.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(rest[:-2], sizes[2:], rtol=1e-3)


def test_spiked_weights_lose_less_than_with_loftq() -> None:
    for seed in range(3):
        weight = spiked(seed)
        loftq = decompose(weight, four_bits, 2, 1)
        ours = decompose(weight, four_bits, 2, 20, largest_directions(weight, 2))
        actual = weight - four_bits(without(weight, ours.removed)) - ours.up @ ours.down
        assert float(actual.norm()) == pytest.approx(ours.error, rel=1e-4)
        assert ours.error < 0.5 * loftq.error


def test_all_clients_start_alike_and_an_adapter_folder_knows_its_start(tmp_path: Path) -> None:
    section = ModelSection(path=str(saved("llama", tmp_path / "base")), quantization="rtn4", group_size=8)
    options = {"method": "lora", "r": 4, "init_lora_weights": "lq-lora", "loftq_config": {"loftq_iter": 2}}
    peft = PeftSection.model_validate(options)
    one, two = (attach(load_base(section), peft, task="causal-lm", seed=seed) for seed in (1, 2))
    assert digest_frozen(one) == digest_frozen(two)
    first, second = get_arrays(one), get_arrays(two)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    plain = PeftSection.model_validate({"method": "lora", "r": 4})
    assert digest_frozen(one) != digest_frozen(attach(load_base(section), plain, task="causal-lm", seed=1))
    export_adapter(one, tmp_path / "adapter", base_name="x")
    reloaded = load_adapter(load_base(section), tmp_path / "adapter")
    assert torch.equal(logits(reloaded, "llama"), logits(one, "llama"))


def test_a_full_precision_base_is_refused_by_name() -> None:
    problem = loftq_problem("lora", {"init_lora_weights": "lq-lora"}, "none")
    assert problem is not None
    assert problem.startswith("peft.init_lora_weights 'lq-lora' starts from a quantised base")
