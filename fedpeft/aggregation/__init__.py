"""From updates to one change: exact sums, staleness, robust rules and rules for LoRA's factors."""
