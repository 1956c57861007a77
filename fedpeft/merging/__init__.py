"""Merging adapters of one base: rules over named deltas, and exact arithmetic on LoRA's products."""

from fedpeft.merging.breadcrumbs import Breadcrumbs
from fedpeft.merging.dare import Dare
from fedpeft.merging.linear import Average, TaskArithmetic
from fedpeft.merging.lines import Lines, scale_blocks
from fedpeft.merging.lora_names import LoraArrays, put_together, take_apart
from fedpeft.merging.lowrank import (
    LoraFactors,
    ProductSvd,
    Split,
    merged_in_product_space,
    product_norm,
    product_svd,
    relative_aggregation_error,
    stacked,
    truncated,
)
from fedpeft.merging.methods import METHODS, best_on_held_out, merger_named
from fedpeft.merging.pcb import Pcb
from fedpeft.merging.stack import AdapterStack, Merger, adapter_stack
from fedpeft.merging.ties import Ties

__all__ = [
    "METHODS",
    "AdapterStack",
    "Average",
    "Breadcrumbs",
    "Dare",
    "Lines",
    "LoraArrays",
    "LoraFactors",
    "Merger",
    "Pcb",
    "ProductSvd",
    "Split",
    "TaskArithmetic",
    "Ties",
    "adapter_stack",
    "best_on_held_out",
    "merged_in_product_space",
    "merger_named",
    "product_norm",
    "product_svd",
    "put_together",
    "relative_aggregation_error",
    "scale_blocks",
    "stacked",
    "take_apart",
    "truncated",
]
