"""Differential privacy: what was released, what that costs, and the noise that pays for it."""
