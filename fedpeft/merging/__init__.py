"""Merging adapters of one base: rules over named deltas, and LoRA's factors by their names."""

from fedpeft.merging.breadcrumbs import Breadcrumbs
from fedpeft.merging.configurations import first_difference
from fedpeft.merging.dare import Dare
from fedpeft.merging.factors_only import FactorsOnly, whole_tensors
from fedpeft.merging.linear import Average, TaskArithmetic
from fedpeft.merging.lines import Lines, scale_blocks
from fedpeft.merging.lora_names import LoraArrays, put_together, take_apart
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
    "FactorsOnly",
    "Lines",
    "LoraArrays",
    "Merger",
    "Pcb",
    "TaskArithmetic",
    "Ties",
    "adapter_stack",
    "best_on_held_out",
    "first_difference",
    "merger_named",
    "put_together",
    "scale_blocks",
    "take_apart",
    "whole_tensors",
]
