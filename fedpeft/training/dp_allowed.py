"""Which PEFT methods may train under record-level privacy, on which models; everything else is refused.

Opacus's own validation is no proof: some methods pass it and get wrong per-example gradients without a word.
A combination stands in `ALLOWED` because a test compares the per-example gradients of every trained tensor
with those of one example at a time; the largest error there is 1e-6 of an example's whole gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from fedpeft.errors import PrivacyError

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
