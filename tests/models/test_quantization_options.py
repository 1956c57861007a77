"""Options of quantised bases: what they change, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedpeft.config.run_file import build_run
from fedpeft.config.sections import ModelSection
from fedpeft.errors import ModelError, RunFileError
from fedpeft.models.base_model import load_base
from fedpeft.models.rounded_linear import RoundedLinear
from fedpeft.models.trainable import digest_frozen
from tests.models.tiny import LABELS, logits, saved

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the extra 'quant'")
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("llama"))


def base(folder: Path, **options: Any) -> nn.Module:
    return load_base(ModelSection.model_validate({"path": str(folder), **options}))


def test_double_quantisation_is_the_default_and_can_be_turned_off(folder: Path) -> None:
    twice, once = (
        base(folder, quantization="nf4"),
        base(folder, quantization="nf4", double_quantization=False),
    )
    weight: Any = twice.get_submodule(UP).get_parameter("weight")
    assert weight.quant_state.nested
    weight = once.get_submodule(UP).get_parameter("weight")
    assert not weight.quant_state.nested
    assert weight.quant_state.absmax.dtype == torch.float32
    assert digest_frozen(twice) != digest_frozen(once)
    told = base(folder, quantization="nf4", double_quantization=True)
    assert digest_frozen(told) == digest_frozen(twice)


@pytest.mark.parametrize("kind", ["nf4", "rtn4"])
def test_products_are_taken_in_the_compute_dtype(folder: Path, kind: str) -> None:
    exact, rough = base(folder, quantization=kind), base(folder, quantization=kind, compute_dtype="bfloat16")
    one, two = logits(exact, "llama"), logits(rough, "llama")
    error = float((one - two).norm() / one.norm())
    assert 1e-4 < error < 3e-2  # bfloat16 keeps eight bits: 0.4% per product
    assert digest_frozen(exact) == digest_frozen(rough)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "rtn8", "rtn4"])
def test_named_modules_and_the_head_stay_as_they_are(folder: Path, kind: str) -> None:
    kept = base(folder, quantization=kind, keep_modules=["up_proj", "layers.1"])
    plain = {name for name, module in kept.named_modules() if type(module) is nn.Linear}
    of_the_second_layer = {name for name, _ in kept.named_modules() if name.startswith("model.layers.1.")}
    assert {"lm_head", UP} < plain
    assert {n for n in plain if n.startswith("model.layers.1.")} == {
        n for n in of_the_second_layer if n.endswith("_proj")
    }
    assert plain == {"lm_head", UP} | {n for n in of_the_second_layer if n.endswith("_proj")}
    assert torch.equal(
        kept.get_submodule(UP).get_parameter("weight"), base(folder).get_submodule(UP).get_parameter("weight")
    )


@pytest.mark.parametrize("kind", ["nf4", "int8", "rtn8"])
def test_what_a_classifier_draws_is_not_quantised(kind: str, tmp_path: Path) -> None:
    section = {"path": str(saved("bert", tmp_path)), "task": "sequence-classification", "quantization": kind}
    model = load_base(ModelSection.model_validate(section), num_labels=LABELS)
    assert type(model.get_submodule("classifier")) is nn.Linear
    assert type(model.get_submodule("bert.pooler.dense")) is nn.Linear
    assert type(model.get_submodule("bert.encoder.layer.0.attention.self.query")) is not nn.Linear


def test_groups_of_columns_have_their_own_scales(folder: Path) -> None:
    layer = base(folder, quantization="rtn4", group_size=8).get_submodule(UP)
    assert isinstance(layer, RoundedLinear)
    assert layer.weight_scale.shape == layer.weight_zero.shape == (64, 4)
    assert layer.weight.shape == (64, 16)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quantization": "nf4", "keep_modules": ["gate"]}, "model.keep_modules names 'gate'"),
        ({"quantization": "nf4", "keep_modules": ["model"]}, "leaves nothing to quantise"),
        ({"quantization": "rtn4", "group_size": 24}, "cannot be rounded to 4 bits: 32 columns came"),
    ],
)
def test_what_only_the_model_shows_is_one_line(folder: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        base(folder, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"double_quantization": True},
            "quantization is 'none', and double_quantization belongs to nf4, fp4",
        ),
        ({"quantization": "int8", "double_quantization": False}, "double_quantization belongs to nf4, fp4"),
        ({"quantization": "int8", "compute_dtype": "bfloat16"}, "compute_dtype belongs to"),
        ({"quantization": "nf4", "group_size": 64}, "group_size belongs to rtn8, rtn4"),
        ({"keep_modules": ["up_proj"]}, "keep_modules belongs to"),
        ({"quantization": "nf5"}, "quantization"),
        ({"quantization": "rtn4", "group_size": 1}, "group_size"),
    ],
)
def test_an_option_without_its_quantisation_is_refused(options: dict[str, Any], said: str) -> None:
    tables = {"run": {"name": "x", "rounds": 1}, "model": options}
    with pytest.raises(RunFileError, match=said):
        build_run(tables, source="test")
