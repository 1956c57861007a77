"""The optimisers of bitsandbytes: moments in eight bits, or in pages that leave a full GPU.

Source: Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861); Dettmers et
al. 2023, "QLoRA" (arXiv 2305.14314), section 3, on pages.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from fedpeft.config.sections import TrainingSection
from fedpeft.errors import MissingExtraError, TrainingError

CLASSES = {"adamw8bit": "AdamW8bit", "paged-adamw": "PagedAdamW", "paged-adamw8bit": "PagedAdamW8bit"}
SMALLEST = 4096  # numbers of a parameter; smaller ones keep moments of 32 bits
BLOCK = 256  # numbers that share a scale


def eight_bit(name: str, parameters: list[nn.Parameter], section: TrainingSection) -> torch.optim.Optimizer:
    """One of `CLASSES` over the parameters.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
        TrainingError: pages are asked for and a parameter is not on a CUDA device.
    """
    if find_spec("bitsandbytes") is None:
        raise MissingExtraError(
            f"training.optimizer '{name}' needs bitsandbytes; install the extra: pip install 'fedpeft[quant]'"
        )
    places = {parameter.device.type for parameter in parameters}
    if name.startswith("paged") and places != {"cuda"}:
        raise TrainingError(
            f"training.optimizer '{name}' pages a GPU's memory, and the trained parameters are on"
            f" {', '.join(sorted(places))}; use adamw8bit or adafactor"
        )
    from bitsandbytes import optim  # an extra

    made: Any = getattr(optim, CLASSES[name])(parameters, lr=section.lr, weight_decay=section.weight_decay)
    optimizer: torch.optim.Optimizer = made
    return optimizer


def count_kept_bytes(name: str, numbers: int) -> int:
    """Bytes kept between steps for one parameter of so many numbers."""
    if not name.endswith("8bit") or numbers < SMALLEST:
        return 8 * numbers
    scales = 4 * -(-numbers // BLOCK)
    return 2 * (numbers + scales)  # the two tables of 256 levels are shared by all parameters
