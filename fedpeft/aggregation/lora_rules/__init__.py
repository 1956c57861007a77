"""How a federation averages LoRA factors: rules by name, and what each client holds and sends under them."""

from fedpeft.aggregation.lora_rules.compose import lora_problems
from fedpeft.aggregation.lora_rules.measure import Distance, distance_of, together
from fedpeft.aggregation.lora_rules.modules import Combined, ModuleReplies, combine_named
from fedpeft.aggregation.lora_rules.residual_names import is_residual, residual_arrays, residuals_of
from fedpeft.aggregation.lora_rules.shares import Share, Shares, rank_of
from fedpeft.aggregation.lora_rules.table import LORA_RULES, LoraRule, rule_of

__all__ = [
    "LORA_RULES",
    "Combined",
    "Distance",
    "LoraRule",
    "ModuleReplies",
    "Share",
    "Shares",
    "combine_named",
    "distance_of",
    "is_residual",
    "lora_problems",
    "rank_of",
    "residual_arrays",
    "residuals_of",
    "rule_of",
    "together",
]
