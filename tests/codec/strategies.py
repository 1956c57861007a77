"""Hypothesis strategies for the codec's tests."""

from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9)
"""Includes 0-d, empty and size-1 tensors."""

finite_floats = st.floats(allow_nan=False, allow_infinity=False, width=32)
# Few distinct values, so that ties, zeros of both signs and denormals are common.
tied_floats = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0**-149, -(2.0**-149), 2.0**126])

deltas = hnp.arrays("float32", shapes, elements=st.one_of(finite_floats, tied_floats))
trits = hnp.arrays("int8", shapes, elements=st.sampled_from([-1, 0, 0, 0, 1]))
densities = st.sampled_from([0.0, 0.01, 0.1, 0.3, 0.5, 0.9, 1.0])
