"""Attaching: what trains by default, and every refusal in one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fedpeft.config.sections import PeftSection
from fedpeft.errors import ModelError
from fedpeft.models.attach import attach
from fedpeft.models.methods import METHODS, base_refusal, with_options
from fedpeft.models.options import peft_problems, validate_peft
from fedpeft.models.trainable import count_parameters, trainable_parameters
from tests.models.tiny import TASKS, batch, tiny_base

HIDDEN, INNER, KEYS, LAYERS, LABELS = 32, 64, 16, 2, 3
HEAD = LABELS * HIDDEN + LABELS


def wrapped(kind: str, base: nn.Module | None = None, **options: Any) -> nn.Module:
    section = PeftSection.model_validate(options)
    return attach(base or tiny_base(kind), section, task=TASKS[kind], seed=1)


def refused(kind: str, base: nn.Module | None = None, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        wrapped(kind, base, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_lora_takes_every_linear_layer_but_the_head() -> None:
    r = 4
    sizes = [(HIDDEN, HIDDEN)] * 2 + [(HIDDEN, KEYS)] * 2 + [(HIDDEN, INNER)] * 2 + [(INNER, HIDDEN)]
    expected = LAYERS * sum(r * (wide + tall) for wide, tall in sizes)
    base = sum(p.numel() for p in tiny_base("llama").parameters())
    assert count_parameters(wrapped("llama", method="lora", r=r)) == (expected, base + expected)


def test_a_classifier_trains_its_head_beside_the_adapter() -> None:
    model = wrapped("bert", method="lora", r=2, target_modules=["query"])
    assert count_parameters(model)[0] == LAYERS * 2 * 2 * HIDDEN + HEAD
    heads = [name for name in trainable_parameters(model) if "lora" not in name]
    assert [name.rpartition("classifier.")[2] for name in heads] == [
        "modules_to_save.default.bias",
        "modules_to_save.default.weight",
    ]


def test_bitfit_trains_every_bias_and_no_more() -> None:
    biases = sum(p.numel() for name, p in tiny_base("bert").named_parameters() if name.endswith("bias"))
    assert count_parameters(wrapped("bert", method="bitfit"))[0] == biases + LABELS * HIDDEN


def test_full_trains_every_weight_once_tied_ones_together() -> None:
    base = tiny_base("llama")
    total = sum(p.numel() for p in base.parameters())
    model = wrapped("llama", base, method="full")
    assert count_parameters(model)[0] == total
    assert count_parameters(wrapped("bert", method="full"))[0] == sum(
        p.numel() for p in tiny_base("bert").parameters()
    )


@pytest.mark.parametrize(
    ("kind", "method", "expected"),
    [
        ("llama", "ia3", LAYERS * (KEYS + KEYS + INNER)),
        ("bert", "ia3", LAYERS * (HIDDEN + HIDDEN + HIDDEN + INNER) + HEAD),
        ("llama", "ln-tuning", HIDDEN * (2 * LAYERS + 1)),
        ("bert", "ln-tuning", 2 * HIDDEN * (2 * LAYERS + 1) + HEAD),
        ("llama", "head", 96 * HIDDEN),
        ("bert", "head", HEAD),
        ("llama", "ssf", LAYERS * 2 * (2 * HIDDEN + 2 * KEYS + 2 * INNER + HIDDEN)),
        ("llama", "bottleneck", LAYERS * 2 * (2 * 16 * HIDDEN + 16 + HIDDEN)),
        ("bert", "bottleneck", LAYERS * 2 * (2 * 16 * HIDDEN + 16 + HIDDEN) + HEAD),
    ],
)
def test_default_targets(kind: str, method: str, expected: int) -> None:
    assert count_parameters(wrapped(kind, method=method))[0] == expected


def test_an_expression_may_name_the_targets() -> None:
    model = wrapped("llama", method="lora", r=1, target_modules=r".*layers\.1\..*q_proj")
    assert count_parameters(model)[0] == 2 * HIDDEN


def test_trained_parameters_are_float32_on_a_bfloat16_base_and_the_head_too() -> None:
    model = wrapped("bert", tiny_base("bert").bfloat16(), method="lora")
    assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float32}
    loss = model(**batch("bert")).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad is not None for p in trainable_parameters(model).values())


def test_an_unknown_method_names_its_neighbours() -> None:
    assert "did you mean" in refused("llama", method="lor")
    assert "known: " in refused("llama", method="zzz")


@pytest.mark.parametrize(("method", "why"), [("cpt", "raw training tokens"), ("adalora", "changes ranks")])
def test_a_method_that_cannot_be_federated_says_why(method: str, why: str) -> None:
    assert why in refused("llama", method=method)


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
def test_an_initialisation_from_data_is_refused(init: str) -> None:
    assert f"init_lora_weights '{init}' is refused" in refused("llama", method="lora", init_lora_weights=init)


def test_all_problems_of_a_section_come_at_once() -> None:
    section = PeftSection.model_validate({"method": "lora", "ranks": 4, "r": "8", "lora_dropout": True})
    problems = peft_problems(section, "causal-lm")
    assert len(problems) == 3
    assert any("peft.ranks is no option of 'lora'" in problem for problem in problems)
    assert any("peft.r is '8'; 'lora' needs a whole number" in problem for problem in problems)
    assert any("peft.lora_dropout is True; 'lora' needs a number" in problem for problem in problems)
    with pytest.raises(ModelError, match=r"ranks.*;.*needs"):
        validate_peft(section, "causal-lm")


def test_a_misspelt_option_gets_its_neighbour() -> None:
    assert "did you mean 'lora_alpha'?" in refused("llama", method="lora", lora_alfa=3)


def test_what_makes_the_method_cannot_be_changed() -> None:
    assert "part of what 'dora' is" in refused("llama", method="dora", use_dora=False)


def test_a_valid_section_has_no_problem() -> None:
    section = PeftSection.model_validate(
        {"method": "lora", "r": 8, "lora_dropout": 0, "target_modules": ["q_proj"]}
    )
    assert peft_problems(section, "causal-lm") == ()


def test_absent_targets_list_what_is_there() -> None:
    said = refused("llama", method="lora", target_modules=["q_proj", "query"])
    assert "'query', which is not in the model" in said
    assert all(name in said for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"))
    assert "did you mean 'v_proj'" in refused("llama", method="lora", target_modules=["v_pro"])


@pytest.mark.parametrize("key", ["modules_to_save", "exclude_modules"])
def test_other_module_names_are_checked_too(key: str) -> None:
    assert f"peft.{key} names 'nowhere'" in refused(
        "llama", method="lora", **dict[str, Any]({key: ["nowhere"]})
    )


@pytest.mark.parametrize("targets", [[], [3], 7, {"q_proj": 1}])
def test_targets_of_the_wrong_type(targets: Any) -> None:
    assert "needs a list of module names" in refused("llama", method="lora", target_modules=targets)


@pytest.mark.parametrize(
    ("pattern", "said"), [("(", "is no regular expression"), ("x+", "matches no module")]
)
def test_an_expression_that_fits_nothing(pattern: str, said: str) -> None:
    assert said in refused("llama", method="lora", target_modules=pattern)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"rank_pattern": {"q_porj": 2}},
            "rank_pattern: 'q_porj' no module that is wrapped; did you mean 'q_proj'",
        ),
        ({"alpha_pattern": {"o_proj": 2}, "target_modules": ["q_proj"]}, "alpha_pattern: 'o_proj' no module"),
        ({"layers_to_transform": [0, 7]}, "names layer 7, which the model lacks; there are 0, 1"),
        ({"layers_to_transform": [99]}, "names layer 99, which the model lacks; there are 0, 1"),
        ({"lora_alpha": 0}, "q_proj is scaled by 0, so that nothing would be learned"),
        ({"alpha_pattern": {"q_proj": 0}}, "q_proj is scaled by 0, so that nothing would be learned"),
        (
            {"layers_to_transform": 1, "layers_pattern": ["layers", "h"]},
            "layers_pattern: 'h' no list of layers",
        ),
        (
            {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]},
            "'k_proj' is wrapped nowhere",
        ),
        (
            {"target_parameters": ["gate_porj.weight"]},
            "target_parameters: 'gate_porj.weight' names no parameter",
        ),
    ],
)
def test_every_name_and_pattern_must_match(options: dict[str, Any], said: str) -> None:
    assert said in refused("llama", method="lora", **({"target_modules": ["q_proj"]} | options))


def test_names_and_patterns_that_match_are_taken() -> None:
    section = PeftSection.model_validate(
        {
            "method": "lora",
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 2, r".*layers\.1\..*": 3},
            "alpha_pattern": {"v_proj": 5},
            "layers_to_transform": [0, 1],
            "layers_pattern": "layers",
        }
    )
    model = attach(tiny_base("llama"), section, task="causal-lm", seed=0)
    ranks = {
        name.split(".lora_A")[0]: p.shape[0] for name, p in model.named_parameters() if ".lora_A." in name
    }
    assert sorted(ranks.values()) == [2, 3, 3, 8]


@pytest.mark.parametrize("option", ["ensure_weight_tying", "layer_replication"])
def test_an_option_whose_result_does_not_come_out_is_refused(option: str) -> None:
    value: Any = True if option == "ensure_weight_tying" else [[0, 2], [1, 2]]
    assert f"peft.{option} is refused" in refused("llama", method="lora", **{option: value})


def test_a_start_that_is_drawn_at_each_load_is_refused() -> None:
    assert "drawn anew" in refused("llama", method="lora", init_lora_weights="pissa_niter_4")


@pytest.mark.parametrize(
    ("options", "like"),
    [
        ({"use_dora": True}, "dora"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"kasa_config": {}}, "kasa"),
    ],
)
def test_an_option_brings_what_its_method_cannot_do(options: dict[str, Any], like: str) -> None:
    changed = with_options(METHODS["lora"], options)
    for kind in ("none", "int8", "nf4", "rtn8"):
        assert base_refusal(changed, kind) == base_refusal(METHODS[like], kind)
    assert changed.changes_base_at_init == METHODS[like].changes_base_at_init
    assert not with_options(METHODS["ffa-lora"], {"use_dora": True}).linear_in_trained
    assert with_options(METHODS["lora"], {"use_dora": False}) == METHODS["lora"]


def test_a_value_that_peft_refuses_is_one_line() -> None:
    assert "cannot be attached" in refused("llama", method="lora", r=0)
    assert "refuses its options" in refused("llama", method="bottleneck", non_linearity="step")


def test_bitfit_needs_biases() -> None:
    assert "trains biases, and this model has none" in refused("llama", method="bitfit")
    assert "trains biases, and this model has none" in refused("llama-classifier", method="bitfit")


@pytest.mark.parametrize("method", ["full", "ln-tuning", "bitfit", "head"])
def test_training_the_bases_own_weights_needs_float32(method: str) -> None:
    assert "set model.dtype 'float32'" in refused("bert", tiny_base("bert").bfloat16(), method=method)


def test_lora_biases_need_float32_too() -> None:
    assert "set model.dtype 'float32'" in refused(
        "bert", tiny_base("bert").bfloat16(), method="lora", bias="all"
    )


@pytest.mark.parametrize("method", ["prompt", "p-tuning"])
def test_virtual_tokens_before_a_decoder_that_classifies_are_refused(method: str) -> None:
    assert "cannot tell padding" in refused("llama-classifier", method=method)
