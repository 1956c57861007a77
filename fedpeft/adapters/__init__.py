"""Merging adapters of one base: rules over named deltas, and LoRA's factors by their names."""

from fedpeft.adapters.breadcrumbs import Breadcrumbs
from fedpeft.adapters.configurations import first_difference
from fedpeft.adapters.dare import DareMerge
from fedpeft.adapters.factors_only import FactorsOnly, whole_tensors
from fedpeft.adapters.linear import Average, TaskArithmetic
from fedpeft.adapters.lines import Lines, scale_blocks
from fedpeft.adapters.lora_names import LoraArrays, put_together, take_apart
from fedpeft.adapters.merge_rules import METHODS, best_on_held_out, merger_named
from fedpeft.adapters.pcb import Pcb
from fedpeft.adapters.stack import AdapterStack, Merger, adapter_stack
from fedpeft.adapters.ties import Ties

__all__ = [
    "METHODS",
    "AdapterStack",
    "Average",
    "Breadcrumbs",
    "DareMerge",
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
