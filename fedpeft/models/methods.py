"""The table of PEFT methods: what each is, how it is built and what it allows.

A method that `peft` adds is one line of `METHODS`. Nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, Literal

from fedpeft.config.traits import NO_TRAITS, Trait, Traits, choose_traits
from fedpeft.errors import ModelError
from fedpeft.plugins import EntryTable, instance_of

Targets = Literal[
    "linear", "rounded", "ia3", "norm", "block-output", "every-leaf", "head", "first-linear", "none"
]
"""Which modules a method wraps when the run file names none:

linear: all linear layers but the head; rounded: all that hold rounded integers; ia3: keys, values and the
second feed-forward layer; norm: norm
layers; block-output: the layers that end an attention or a feed-forward block; every-leaf: every module that
holds weights; head: the language-model head (a classification head is trained beside every method);
first-linear: one linear layer, for a carrier that leaves it alone; none: nothing is wrapped.
"""

Trained = Literal["adapter", "not-a", "biases"]
"""Which of the adapter's parameters train: all of them, all but LoRA's A, or the base model's biases only."""

STARTS_FROM_WEIGHTS = frozenset(
    {"pissa", "olora", "loftq", "lq-lora", "eva", "corda", "orthogonal", "lora_ga"}
)
"""Values of `init_lora_weights` with which factors start from the base's weights."""

_BOTH = ("causal-lm", "sequence-classification")


def _none() -> Mapping[str, Any]:
    return MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Method:
    """One PEFT method.

    Attributes:
        name: as the run file says it.
        summary: one line for people.
        source: the paper.
        config: name of the config class, in `peft` or among our own tuners.
        fixed: options that make the method what it is; the run file cannot change them.
        defaults: options that differ from the config class's own defaults; the run file may change them.
        fit: names the rule that sizes further defaults to the model (see `fedpeft.models.targets`).
        targets: the default target modules.
        trained: which parameters train.
        tasks: tasks it works for.
        changes_base_at_init: attaching rewrites base weights, so all clients need one attachment, by digest.
        draws_frozen_tensors: keeps frozen tensors of its own (random draws from the seed or from a key among
            the options, singular vectors) that all clients must share; the frozen digest covers them.
        linear_in_trained: effective weights are affine in the trained parameters, so that the mean of the
            parameters is the mean of the models.
        starts_at_base: the model computes what the base computes until trained.
        needs_bias: refused on a model without bias parameters.
        virtual_tokens: prepends virtual tokens; logits of a language model are longer by them, and a decoder
            that classifies cannot find its last token (prompt, P-tuning).
        mergeable: can be folded into the base's weights.
        trains_base_tensors: trains copies of the base's own tensors, so these must be float32.
        gradient_checkpointing: works with it.
        quantized_bfloat16: works on a quantised base whose other weights are bfloat16.
        refused_quantization: quantisation -> why the method cannot work on such a base.
        needs_quantization: the kinds of bases that the method is made for; empty: all that aren't refused.
        declares: what else decides which runs it can be part of.
    """

    name: str
    summary: str
    source: str
    config: str
    fixed: Mapping[str, Any] = field(default_factory=_none)
    defaults: Mapping[str, Any] = field(default_factory=_none)
    fit: str | None = None
    targets: Targets = "linear"
    trained: Trained = "adapter"
    tasks: tuple[str, ...] = _BOTH
    changes_base_at_init: bool = False
    draws_frozen_tensors: bool = False
    linear_in_trained: bool = False
    starts_at_base: bool = True
    needs_bias: bool = False
    virtual_tokens: bool = False
    mergeable: bool = True
    trains_base_tensors: bool = False
    gradient_checkpointing: bool = True
    quantized_bfloat16: bool = True
    refused_quantization: Mapping[str, str] = field(default_factory=_none)
    needs_quantization: tuple[str, ...] = ()
    declares: Traits = NO_TRAITS

    @property
    def traits(self) -> Traits:
        """What it is, as `fedpeft.compatibility` asks."""
        from_weights = self.fixed.get("init_lora_weights") in STARTS_FROM_WEIGHTS
        told = {
            Trait.STARTS_FROM_WEIGHTS: from_weights,
            Trait.NEEDS_ROUNDED_BASE: bool(self.needs_quantization),
        }
        return self.declares | choose_traits(told)


ROUNDED = ("rtn8", "rtn4")
"""Quantisations to frozen integers with scales of their own; see `fedpeft.models.rounded_linear`."""

_PACKED = ("int8", "nf4", "fp4", *ROUNDED)
_UNPACKED = MappingProxyType(dict.fromkeys(_PACKED, "it works on the unpacked weight matrix"))
_SCALES_LOST = MappingProxyType(
    dict.fromkeys(_PACKED, "its fixed scales take the weight's integer type, and are lost")
)
_ON_ROUNDED = MappingProxyType(dict.fromkeys(ROUNDED, "it works on the unpacked weight matrix"))
_TRAINED_WHOLE = MappingProxyType(dict.fromkeys(_PACKED, "quantised weights cannot be trained"))
_NO_INT8 = MappingProxyType({"int8": "it fails on 8-bit layers on the CPU"})
_NO_INT8_NOR_ROUNDED = MappingProxyType({**_NO_INT8, **_ON_ROUNDED})

_TABLE = (
    Method(
        name="lora",
        summary="low-rank update B A beside each weight",
        source="Hu et al. 2021, arXiv 2106.09685",
        config="LoraConfig",
        declares=frozenset({Trait.TRAINS_BOTH_FACTORS}),
    ),
    Method(
        name="rslora",
        summary="LoRA scaled by alpha / sqrt(r), stable at high rank",
        source="Kalajdzievski 2023, arXiv 2312.03732",
        config="LoraConfig",
        fixed={"use_rslora": True},
        declares=frozenset({Trait.TRAINS_BOTH_FACTORS}),
    ),
    Method(
        name="dora",
        summary="LoRA on the direction of each weight, its magnitude trained apart",
        source="Liu et al. 2024, arXiv 2402.09353",
        config="LoraConfig",
        fixed={"use_dora": True},
        refused_quantization=_NO_INT8_NOR_ROUNDED,
    ),
    Method(
        name="ffa-lora",
        summary="LoRA with A frozen at its random draw: averaging B is exact",
        source="Sun, Li, Li, Ding 2024, arXiv 2403.12313",
        config="LoraConfig",
        trained="not-a",
        declares=frozenset({Trait.TRAINS_FACTOR_B}),
        draws_frozen_tensors=True,
        linear_in_trained=True,
    ),
    Method(
        name="pissa",
        summary="LoRA started at the principal singular vectors, the base keeps the rest",
        source="Meng, Wang, Zhang 2024, arXiv 2404.02948",
        config="LoraConfig",
        fixed={"init_lora_weights": "pissa"},
        changes_base_at_init=True,
        refused_quantization=_UNPACKED,
    ),
    Method(
        name="olora",
        summary="LoRA started at an orthonormal (QR) factor, the base keeps the rest",
        source="Büyükakyüz 2024, arXiv 2406.01775",
        config="LoraConfig",
        fixed={"init_lora_weights": "olora"},
        changes_base_at_init=True,
        refused_quantization=_UNPACKED,
    ),
    Method(
        name="ia3",
        summary="trained scales on keys, values and the inner feed-forward activations",
        source="Liu et al. 2022, arXiv 2205.05638",
        config="IA3Config",
        quantized_bfloat16=False,
        targets="ia3",
        linear_in_trained=True,
    ),
    Method(
        name="prompt",
        summary="trained embeddings before the input",
        source="Lester, Al-Rfou, Constant 2021, arXiv 2104.08691",
        config="PromptTuningConfig",
        defaults={"num_virtual_tokens": 16},
        targets="none",
        linear_in_trained=True,
        starts_at_base=False,
        virtual_tokens=True,
        mergeable=False,
    ),
    Method(
        name="prefix",
        summary="trained keys and values before the input of every layer",
        source="Li, Liang 2021, arXiv 2101.00190",
        config="PrefixTuningConfig",
        declares=frozenset({Trait.OUTSIDE_LAYERS}),
        defaults={"num_virtual_tokens": 16},
        targets="none",
        linear_in_trained=True,
        starts_at_base=False,
        mergeable=False,
        gradient_checkpointing=False,
    ),
    Method(
        name="p-tuning",
        summary="embeddings before the input, made by a small trained network",
        source="Liu et al. 2021, arXiv 2103.10385",
        config="PromptEncoderConfig",
        defaults={"num_virtual_tokens": 16},
        targets="none",
        starts_at_base=False,
        virtual_tokens=True,
        mergeable=False,
    ),
    Method(
        name="vera",
        summary="trained scales around random matrices that all layers share",
        source="Kopiczko, Blankevoort, Asano 2023, arXiv 2310.11454",
        config="VeraConfig",
        draws_frozen_tensors=True,
    ),
    Method(
        name="randlora",
        summary="full-rank sums of random bases with trained scales",
        source="Albert et al. 2025, arXiv 2502.00987",
        config="RandLoraConfig",
        quantized_bfloat16=False,
        draws_frozen_tensors=True,
    ),
    Method(
        name="oft",
        summary="each weight turned by a block-diagonal orthogonal matrix",
        source="Qiu et al. 2023, arXiv 2306.07280",
        config="OFTConfig",
        fit="oft",
    ),
    Method(
        name="boft",
        summary="each weight turned by a product of butterfly orthogonal matrices",
        source="Liu et al. 2023, arXiv 2311.06243",
        config="BOFTConfig",
        refused_quantization=_UNPACKED,
    ),
    Method(
        name="miss",
        summary="one small matrix, repeated over the shards of each weight",
        source="Kang, Yin 2024, arXiv 2409.15371",
        config="MissConfig",
        defaults={"r": 8},
        linear_in_trained=True,
    ),
    Method(
        name="ln-tuning",
        summary="the normalisation layers alone",
        source="Zhao et al. 2023, arXiv 2312.11420",
        config="LNTuningConfig",
        targets="norm",
        linear_in_trained=True,
        trains_base_tensors=True,
    ),
    Method(
        name="loha",
        summary="the elementwise product of two low-rank updates",
        source="Hyeon-Woo, Ye-Bin, Oh 2021, arXiv 2108.06098",
        config="LoHaConfig",
        refused_quantization=_UNPACKED,
    ),
    Method(
        name="lokr",
        summary="a Kronecker product of two small matrices",
        source="Edalati et al. 2022, arXiv 2212.10650",
        config="LoKrConfig",
        refused_quantization=_UNPACKED,
    ),
    Method(
        name="fourierft",
        summary="a few trained Fourier coefficients of each update",
        source="Gao et al. 2024, arXiv 2405.03003",
        config="FourierFTConfig",
        defaults={"init_weights": True},
        fit="fourierft",
        draws_frozen_tensors=True,
        linear_in_trained=True,
    ),
    Method(
        name="hra",
        summary="each weight turned by a chain of trained Householder reflections",
        source="Yuan, Liu, Xu 2024, arXiv 2405.17484",
        config="HRAConfig",
        refused_quantization=_UNPACKED,
    ),
    Method(
        name="vblora",
        summary="LoRA factors mixed from one bank of vectors that all layers share",
        source="Li, Han, Ji 2024, arXiv 2405.15179",
        config="VBLoRAConfig",
        fit="vblora",
        starts_at_base=False,
    ),
    Method(
        name="shira",
        summary="a few randomly chosen entries of each weight",
        source="Bhardwaj et al. 2024, arXiv 2406.13175",
        config="ShiraConfig",
        defaults={"r": 8},
        draws_frozen_tensors=True,
        linear_in_trained=True,
        refused_quantization=_UNPACKED,
    ),
    Method(
        name="c3a",
        summary="a block-circular convolution beside each weight",
        source="Chen et al. 2024, arXiv 2407.19342",
        config="C3AConfig",
        defaults={"init_weights": True},
        fit="c3a",
        refused_quantization=_NO_INT8,
        linear_in_trained=True,
    ),
    Method(
        name="delora",
        summary="LoRA with normalised factors and one trained strength per layer",
        source="Bini, Girrbach, Akata 2025, arXiv 2503.18225",
        config="DeloraConfig",
        refused_quantization=_UNPACKED,
    ),
    Method(
        name="gralora",
        summary="LoRA on a grid of blocks of each weight",
        source="Jung et al. 2025, arXiv 2505.20355",
        config="GraloraConfig",
        defaults={"r": 8, "alpha": 16},
        refused_quantization=_NO_INT8,
    ),
    Method(
        name="hira",
        summary="a low-rank factor multiplied elementwise with the base weight",
        source="Huang et al. 2025, ICLR",
        config="HiraConfig",
        defaults={"r": 8},
        refused_quantization=_UNPACKED,
    ),
    Method(
        name="waveft",
        summary="a few trained wavelet coefficients of each update",
        source="Bilican et al. 2025, arXiv 2505.12532",
        config="WaveFTConfig",
        fit="waveft",
        draws_frozen_tensors=True,
        linear_in_trained=True,
        refused_quantization=_UNPACKED,
    ),
    Method(
        name="psoft",
        summary="an orthogonal turn inside each weight's principal subspace",
        source="openreview.net/forum?id=FSHrinMArK",
        config="PsoftConfig",
        defaults={"r": 8},
        draws_frozen_tensors=True,
        refused_quantization=_UNPACKED,
    ),
    Method(
        name="road",
        summary="pairs of output features turned and scaled",
        source="Liao, Monz 2024, arXiv 2409.00119",
        config="RoadConfig",
        quantized_bfloat16=False,
        fit="road",
    ),
    Method(
        name="glora",
        summary="scale, shift and low-rank updates of weights and biases together",
        source="Chavan et al. 2023, arXiv 2306.07967",
        config="GloraConfig",
        refused_quantization=_UNPACKED,
    ),
    Method(
        name="kasa",
        summary="LoRA with trained singular values, the base's smallest ones removed",
        source="Wang et al. 2024, arXiv 2412.06071",
        config="LoraConfig",
        fixed={"kasa_config": {}},
        changes_base_at_init=True,
        starts_at_base=False,
        refused_quantization=_UNPACKED,
    ),
    Method(
        name="tinylora",
        summary="a handful of numbers that random tensors spread over each weight's singular space",
        source="arXiv 2602.04118",
        config="TinyLoraConfig",
        draws_frozen_tensors=True,
        linear_in_trained=True,
        refused_quantization=_UNPACKED,
    ),
    Method(
        name="unilora",
        summary="LoRA factors picked from one short trained vector",
        source="Li, Han, Ji 2025, arXiv 2506.00799",
        config="UniLoraConfig",
        draws_frozen_tensors=True,
        starts_at_base=False,
        refused_quantization=_SCALES_LOST,
    ),
    Method(
        name="lily",
        summary="low-rank factors shared between layers and mixed by a small router",
        source="Zhong et al. 2024, arXiv 2407.09946",
        config="LilyConfig",
        defaults={"r": 8},
        mergeable=False,
    ),
    Method(
        name="peanut",
        summary="an update computed from each weight by a small network",
        source="Zhong et al. 2024, arXiv 2410.01870",
        config="PeanutConfig",
        defaults={"r": 8},
        refused_quantization=_UNPACKED,
    ),
    Method(
        name="bitfit",
        summary="the base model's biases alone, those of its layer norms included",
        source="Ben Zaken, Ravfogel, Goldberg 2021, arXiv 2106.10199",
        config="LoraConfig",
        fixed={"r": 1, "bias": "all"},
        targets="first-linear",
        trained="biases",
        linear_in_trained=True,
        draws_frozen_tensors=True,
        needs_bias=True,
        trains_base_tensors=True,
    ),
    Method(
        name="head",
        summary="the output layer alone, the features stay",
        source="linear probing: Alain, Bengio 2016, arXiv 1610.01644",
        config="LNTuningConfig",
        targets="head",
        linear_in_trained=True,
        trains_base_tensors=True,
    ),
    Method(
        name="full",
        summary="every weight of the model",
        source="full-parameter fine-tuning",
        config="LNTuningConfig",
        targets="every-leaf",
        linear_in_trained=True,
        trains_base_tensors=True,
        refused_quantization=_TRAINED_WHOLE,
    ),
    Method(
        name="bottleneck",
        summary="a small two-layer network after each attention and feed-forward block",
        source="Houlsby et al. 2019, arXiv 1902.00751",
        config="BottleneckConfig",
        targets="block-output",
        mergeable=False,
    ),
    Method(
        name="ssf",
        summary="a trained scale and shift after each linear layer (FiLM)",
        source="Lian et al. 2022, arXiv 2210.08823; Perez et al. 2017, arXiv 1709.07871",
        config="SSFConfig",
        linear_in_trained=True,
    ),
    Method(
        name="peqa",
        summary="the scales of weights that were rounded to integers, the integers stay",
        source="Kim et al. 2023, arXiv 2305.14152",
        config="PEQAConfig",
        targets="rounded",
        linear_in_trained=True,
        needs_quantization=ROUNDED,
    ),
)

METHODS = EntryTable("peft_methods", {method.name: method for method in _TABLE}, instance_of(Method))
"""Every method that a run file may name."""

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "cpt": "its saved configuration carries raw training tokens, which must not leave a client",
        "adalora": "it changes ranks while it trains, so clients' states stop having one shape",
        "corda": "its initialisation needs a pass over training data, which only clients hold",
        "eva": "its initialisation needs a pass over training data, which only clients hold",
        "lora-ga": "its initialisation needs gradients on training data, which only clients hold",
        "loftq": "it is a start of LoRA: set peft.method 'lora' and peft.init_lora_weights 'loftq'",
        "lq-lora": "it is a start of LoRA: set peft.method 'lora' and peft.init_lora_weights 'lq-lora'",
        "xlora": "it mixes several trained adapters; a run trains one",
        "multitask-prompt": "it needs task ids with every batch",
    }
)
"""Known methods that a run cannot use, with the reason."""

REFUSED_INITS: Mapping[str, str] = MappingProxyType({"corda": "corda", "eva": "eva", "lora_ga": "lora-ga"})
"""Values of `init_lora_weights` that are refused -> the key of `REFUSED` that says why."""


REFUSED_OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "ensure_weight_tying": "tied factors are not so in an adapter's file; name one of the layers",
        "layer_replication": "copies of a layer share its weights, so that no adapter on them can be merged; "
        "make a model of the wanted depth and give its folder as model.path",
    }
)
"""Options of `peft` that a run cannot use, whatever the method, unless they are off -> the reason."""

_REDRAWN = "pissa_niter_"


def init_refusal(value: object) -> str | None:
    """Why a run cannot use this value of `init_lora_weights`; None if it can."""
    if isinstance(value, str) and value.startswith(_REDRAWN):
        return "its start is drawn anew wherever the adapter is loaded, onto another base; use 'pissa'"
    return REFUSED[REFUSED_INITS[value]] if isinstance(value, str) and value in REFUSED_INITS else None


def with_options(method: Method, options: Mapping[str, Any]) -> Method:
    """Return the method as options of the run file make it.

    An option that is what another method is (`use_dora`, `init_lora_weights = "pissa"`) brings what that one
    cannot do.
    """
    for other in METHODS.own.values():
        if other.config == method.config and len(other.fixed) == 1 and _asks_for(other, options):
            method = replace(
                method,
                refused_quantization={**method.refused_quantization, **other.refused_quantization},
                changes_base_at_init=method.changes_base_at_init or other.changes_base_at_init,
                draws_frozen_tensors=method.draws_frozen_tensors or other.draws_frozen_tensors,
                linear_in_trained=method.linear_in_trained and other.linear_in_trained,
                starts_at_base=method.starts_at_base and other.starts_at_base,
            )
    return method


def _asks_for(other: Method, options: Mapping[str, Any]) -> bool:
    (key, value), *_ = other.fixed.items()
    given = options.get(key)
    return given is not None if isinstance(value, Mapping) else type(given) is type(value) and given == value


def base_refusal(method: Method, quantization: str) -> str | None:
    """Why a method cannot work on a base quantised so, with what to set instead; None if it can."""
    if method.needs_quantization and quantization not in method.needs_quantization:
        kinds = " or ".join(f"'{kind}'" for kind in method.needs_quantization)
        return f"it trains the scales of rounded integers; set model.quantization {kinds}"
    reason = method.refused_quantization.get(quantization)
    return None if reason is None else f"{reason}; set model.quantization 'none'"


def method_named(name: str) -> Method:
    """Look a method up.

    Raises:
        ModelError: unknown (with the nearest names) or refused (with the reason).
    """
    if name in METHODS:
        return METHODS[name]
    if name in REFUSED:
        raise ModelError(f"peft.method '{name}' is refused: {REFUSED[name]}")
    near = get_close_matches(name, METHODS, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(METHODS))}"
    raise ModelError(f"peft.method '{name}' is unknown; {hint}")
