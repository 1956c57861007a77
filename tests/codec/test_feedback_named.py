"""Error feedback and whole adapters."""

import numpy as np
import pytest

from fedpeft.codec import (
    DenseTensor,
    StdScale,
    compress_named,
    dense_named,
    distortion,
    encode,
    residual_after,
    ternarise,
    top_k,
    with_residual,
)
from fedpeft.errors import UpdateError


def test_nothing_is_lost_over_rounds() -> None:
    # Small integers: every sum below is exact, so what was sent plus what is left is what was meant.
    rng = np.random.default_rng(0)
    memory: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]] = {}
    meant, sent = np.zeros((5, 6), dtype=np.float32), np.zeros((5, 6), dtype=np.float32)
    for _ in range(20):
        delta = rng.integers(-9, 10, (5, 6)).astype(np.float32)
        meant += delta
        corrected = with_residual({"a": delta}, memory)
        out = {"a": top_k(corrected["a"], 0.1)}
        sent += out["a"].dense()
        memory = residual_after(corrected, out)
        assert np.array_equal(sent + memory["a"], meant)
    assert memory["a"].any()


def test_both_functions_leave_their_input_alone() -> None:
    delta = np.ones(3, dtype=np.float32)
    corrected = with_residual({"a": delta}, {})
    corrected["a"] += 1
    assert delta.tolist() == [1, 1, 1]
    left = residual_after({"a": delta, "kept back": delta}, {"a": DenseTensor(delta)})
    assert left["a"].tolist() == [0, 0, 0]
    assert left["kept back"].tolist() == [1, 1, 1]
    assert delta.tolist() == [1, 1, 1]


def test_foreign_memory_is_refused() -> None:
    one, two = np.ones(1, dtype=np.float32), np.ones(2, dtype=np.float32)
    with pytest.raises(UpdateError, match="'b'"):
        with_residual({"a": one}, {"a": one, "b": one})
    with pytest.raises(UpdateError, match="residual"):
        with_residual({"a": one}, {"a": two})
    with pytest.raises(UpdateError, match="not compressed here"):
        residual_after({"a": one}, {"b": DenseTensor(one)})
    with pytest.raises(UpdateError, match="not compressed here"):
        residual_after({"a": one}, {"a": DenseTensor(two)})


def test_a_compressor_that_touches_nothing_is_an_error() -> None:
    deltas = {"layer.lora_A": np.ones((2, 3), dtype=np.float32), "empty": np.ones((0, 3), dtype=np.float32)}

    def compressor(deltas: object) -> dict[str, DenseTensor]:
        raise AssertionError(f"{deltas} were not selected")

    with pytest.raises(UpdateError, match="matches none of 2 tensors"):
        compress_named(deltas, compressor, lambda name: name.endswith(".weight"))
    with pytest.raises(UpdateError, match="matches none of 2 tensors"):
        compress_named(deltas, compressor, lambda name: name == "empty")
    with pytest.raises(UpdateError, match="matches none of 0 tensors"):
        compress_named({}, compressor, lambda name: True)


def test_unselected_tensors_travel_dense() -> None:
    rng = np.random.default_rng(1)
    deltas = {name: rng.standard_normal((64, 64)).astype(np.float32) for name in ("lora_A", "classifier")}
    coded = compress_named(
        deltas,
        lambda some: {name: ternarise(delta, 0.1, StdScale()) for name, delta in some.items()},
        lambda name: "lora" in name,
    )
    assert np.array_equal(coded["classifier"].dense(), deltas["classifier"])
    assert len(encode(coded["lora_A"])) * 25 < len(encode(coded["classifier"]))
    assert dense_named(coded).keys() == deltas.keys()


def test_distortion_by_hand() -> None:
    original = {"a": np.array([3.0, 0.0], dtype=np.float32), "b": np.array([4.0], dtype=np.float32)}
    copy = {"a": np.array([3.0, 0.0], dtype=np.float32), "b": np.array([0.0], dtype=np.float32)}
    found = distortion(original, copy)
    assert found.relative_l2 == pytest.approx(4 / 5)
    assert found.cosine == pytest.approx(3 / 5)
    zero = {"a": np.zeros(2, dtype=np.float32), "b": np.zeros(1, dtype=np.float32)}
    assert distortion(original, zero).cosine == 0.0
    assert distortion(zero, zero).relative_l2 == 0.0
    assert distortion(zero, copy).relative_l2 == np.inf
    with pytest.raises(UpdateError, match="same tensors"):
        distortion(original, {"a": copy["a"]})
