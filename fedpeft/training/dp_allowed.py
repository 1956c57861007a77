"""Which PEFT methods may train under record-level privacy, on which models; everything else is refused.

Opacus's own validation is no proof: some methods pass it and get wrong per-example gradients without a word.
A combination stands in `ALLOWED` because a test compares the per-example gradients of every trained tensor
with those of one example at a time; the largest error there is 1e-6 of an example's whole gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from fedpeft.config import RecordLevelPrivacy, RunConfig, TrainingSection
from fedpeft.errors import PrivacyError
from fedpeft.training.lean import SAVERS
from fedpeft.training.zeroth_rules import RULES

_LOW_RANK = ("lora", "rslora", "ffa-lora", "pissa", "olora")
_OTHERS = ("prefix", "ln-tuning", "head", "bottleneck")

# (architecture, task) -> methods; architectures by the `model_type` of their configuration.
ALLOWED: Mapping[tuple[str, str], frozenset[str]] = MappingProxyType(
    {
        ("llama", "causal-lm"): frozenset({*_LOW_RANK, *_OTHERS, "full"}),
        ("llama", "sequence-classification"): frozenset({*_LOW_RANK, *_OTHERS, "full"}),
        ("bert", "sequence-classification"): frozenset({*_LOW_RANK, *_OTHERS, "bitfit"}),
    }
)

_ONE_ROW = (
    "its virtual tokens are one row for the whole batch, so per-example gradients are lost in their sum"
)
_BUFFERS = "its trained layers keep buffers, which Opacus refuses"
_OUTSIDE = "its parameters are used outside their own layer's call, where per-example hooks don't see them"

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "prompt": _ONE_ROW,
        "p-tuning": _ONE_ROW,
        "oft": _BUFFERS,
        "psoft": _BUFFERS,
        "dora": "its layers take arguments that per-example hooks don't carry",
        "full": "position embeddings are looked up once for all rows, which loses per-example gradients",
        "bitfit": "it needs biases, and is proven on encoders only",
    }
)


def check_allowed(method: str, architecture: str, task: str, *, quantization: str = "none") -> None:
    """Refuse what is not proven, with the reason and what is.

    Args:
        architecture: `model_type` of the base model's configuration.

    Raises:
        PrivacyError: the combination isn't in `ALLOWED`, or the base is quantised.
    """
    if quantization != "none":
        raise PrivacyError(
            f"model.quantization '{quantization}' is not proven under record-level privacy (8-bit layers give"
            " per-example gradients that are percents off); set 'none'"
        )
    methods = ALLOWED.get((architecture, task))
    if methods is None:
        known = ", ".join(f"{kind} ({work})" for kind, work in sorted(ALLOWED))
        raise PrivacyError(
            f"a {architecture} model for {task} is not proven under record-level privacy; proven are {known}"
        )
    if method not in methods:
        raise PrivacyError(
            f"peft.method '{method}' is refused under record-level privacy on {architecture}:"
            f" {REFUSED.get(method, _OUTSIDE)}; choose one of {', '.join(sorted(methods))}"
        )


def record_problems(run: RunConfig, architecture: str) -> list[str]:
    """Why this model and this training cannot be private at record level, one line each; none if they can.

    Args:
        architecture: `model_type` of the base model's configuration.
    """
    if not isinstance(run.privacy, RecordLevelPrivacy):
        return []
    if run.training.kind == "zeroth-order":  # any model: nothing is differentiated
        return _zeroth_problems(run.training)
    if run.training.kind != "first-order":
        return []
    problems = section_problems(run.training)
    try:
        section = run.model
        check_allowed(run.peft.method, architecture, section.task, quantization=section.quantization)
    except PrivacyError as error:
        problems.append(str(error))
    return problems


def _zeroth_problems(section: TrainingSection) -> list[str]:
    """What a zeroth-order step may not look at beyond its noised scalars."""
    problems, rule = [], RULES.get(section.rule)
    if rule is not None and (rule.step == "best-of-three" or rule.above or rule.measure != "difference"):
        problems.append(
            f"training.rule '{section.rule}' uses losses or gradients beyond the noised scalars; under"
            " record-level privacy choose one of "
            + ", ".join(
                name
                for name, other in RULES.items()
                if other.step != "best-of-three" and not other.above and other.measure == "difference"
            )
        )
    if section.gradient_accumulation != 1:
        problems.append(
            "training.gradient_accumulation cannot be used under record-level privacy: a private step is one"
            " Poisson batch; set 1 and choose the sample rate"
        )
    return problems


def section_problems(section: TrainingSection) -> list[str]:
    """Options of first-order training that DP-SGD cannot honour, one line each."""
    refused = (
        (
            section.gradient_checkpointing,
            "gradient_checkpointing",
            "per-example gradients are lost; set it false",
        ),
        *(
            (saver.asked(section), key, "each example's own gradient is needed, of all parameters; remove it")
            for key, saver in SAVERS.items()
            if key != "gradient_checkpointing"
        ),
        (
            section.precision != "fp32",
            "precision",
            "per-example gradients are proven in fp32 only; set 'fp32'",
        ),
        (
            section.max_grad_norm is not None,
            "max_grad_norm",
            "it bounds a whole batch's gradient; give the bound per example under privacy and remove it here",
        ),
        (
            section.gradient_accumulation != 1,
            "gradient_accumulation",
            "a private step is one Poisson batch; set 1 and choose the sample rate",
        ),
    )
    return [
        f"training.{key} cannot be used under record-level privacy: {why}"
        for wrong, key, why in refused
        if wrong
    ]
