"""Aggregation that bounds what some hostile clients can do, in the geometry that means something."""

from fedpeft.aggregation.robust.coefficients import (
    Coefficients,
    geometric_median,
    krum,
    krum_selection,
    multikrum,
    norm_bound,
)
from fedpeft.aggregation.robust.geometry import Entries, Geometry, Products
from fedpeft.aggregation.robust.pairs import Pair, lora_pairs

__all__ = [
    "Coefficients",
    "Entries",
    "Geometry",
    "Pair",
    "Products",
    "geometric_median",
    "krum",
    "krum_selection",
    "lora_pairs",
    "multikrum",
    "norm_bound",
]
