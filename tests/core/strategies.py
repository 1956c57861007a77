"""Hypothesis strategies for updates of one layout."""

from __future__ import annotations

from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedpeft.updates.update import Layout, Update

NAMES = st.sampled_from(["a", "b.weight", "layers.0.q", "z"])
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
FLOAT, INT = "<f4", "<i8"
DTYPES = st.sampled_from([FLOAT, INT])


def layouts(dtypes: st.SearchStrategy[str] = DTYPES) -> st.SearchStrategy[Layout]:
    """Name to (shape, dtype), as `layout_of` gives it; all of one dtype."""
    return dtypes.flatmap(
        lambda dtype: st.dictionaries(NAMES, st.tuples(SHAPES, st.just(dtype)), min_size=1, max_size=3)
    )


def arrays(shape: tuple[int, ...], dtype: str, bound: int = 1000) -> st.SearchStrategy[NDArray[Any]]:
    """Finite values within `bound`."""
    if dtype == INT:
        return hnp.arrays(np.int64, shape, elements=st.integers(-bound, bound))
    return hnp.arrays(np.float32, shape, elements=st.floats(-bound, bound, width=32))


@st.composite
def updates(draw: st.DrawFn, layout: Layout, bound: int = 1000) -> Update:
    """One update of `layout`."""
    values = {name: draw(arrays(shape, dtype, bound)) for name, (shape, dtype) in layout.items()}
    return Update(values, weight=draw(st.integers(1, 100)))


@st.composite
def several(
    draw: st.DrawFn, low: int, high: int, dtypes: st.SearchStrategy[str] = DTYPES
) -> tuple[Layout, list[Update]]:
    """A layout and from `low` to `high` updates of it."""
    layout = draw(layouts(dtypes))
    return layout, draw(st.lists(updates(layout), min_size=low, max_size=high))
