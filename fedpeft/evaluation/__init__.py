"""How good a model is: per-example quantities, metrics over them, and intervals by resampling."""
