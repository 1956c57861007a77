"""Small tuners that `peft` lacks, in its shape: a config, a layer and a model each.

Importing this package makes them known to `peft`, so that `peft.PeftModel.from_pretrained` loads their
adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from fedpeft.models.tuners.bottleneck import BottleneckConfig, BottleneckModel
from fedpeft.models.tuners.peqa import PEQAConfig, PEQAModel
from fedpeft.models.tuners.ssf import SSFConfig, SSFModel

_TUNERS = ((BottleneckConfig, BottleneckModel), (SSFConfig, SSFModel), (PEQAConfig, PEQAModel))

OWN_CONFIGS: Mapping[str, type[Any]] = {config.__name__: config for config, _ in _TUNERS}
"""Config classes of our own tuners by name."""


def _register() -> None:
    """Enter our types in the tables of `peft`.

    `peft.utils.register_peft_method` takes members of a closed enumeration only; the tables themselves are
    keyed by the type's string.
    """
    for config, model in _TUNERS:
        PEFT_TYPE_TO_CONFIG_MAPPING[config.TYPE] = config
        PEFT_TYPE_TO_TUNER_MAPPING[config.TYPE] = model
        PEFT_TYPE_TO_PREFIX_MAPPING[config.TYPE] = model.prefix


_register()
