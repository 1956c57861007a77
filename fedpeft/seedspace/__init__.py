"""Exact seed space: models as a base plus small integers, the same bits on every machine.

theta = theta_0 + quantum * sum_k A_k z_k with integer A, sign vectors z from a counter-based generator and
a power-of-two quantum. `SeedSpace` holds what a run agrees on, `SeedState` a participant's position in it;
the three kernels are `perturb`, `accumulate` and `project`.
"""
