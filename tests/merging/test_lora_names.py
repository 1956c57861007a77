"""Names of LoRA factors, as peft writes them."""

import numpy as np
import pytest

from fedpeft.adapters.lora_names import LoraArrays, put_together, take_apart
from fedpeft.errors import UpdateError
from fedpeft.updates.low_rank import Split, merge_in_product_space

PREFIX = "base_model.model.layers.0.self_attn.q_proj"
RNG = np.random.default_rng(0)
ARRAYS = {
    f"{PREFIX}.lora_A.weight": RNG.standard_normal((2, 5)).astype(np.float32),
    f"{PREFIX}.lora_B.weight": RNG.standard_normal((4, 2)).astype(np.float32),
    "m.lora_B.default.weight": RNG.standard_normal((3, 3)).astype(np.float32),
    "m.lora_A.default.weight": RNG.standard_normal((3, 3)).astype(np.float32),
    "base_model.model.classifier.weight": np.ones((2, 2), dtype=np.float32),
    "m.not_lora_A.weight": np.ones(1, dtype=np.float32),
}
SCALINGS = {PREFIX: 2.0, "m": 0.5}


def test_pairs_come_apart_and_together() -> None:
    parts = take_apart(ARRAYS, SCALINGS)
    assert set(parts.pairs) == {f"{PREFIX}.{{}}.weight", "m.{}.default.weight"}
    assert set(parts.others) == {"base_model.model.classifier.weight", "m.not_lora_A.weight"}
    # Square factors: only the name tells A from B.
    square = parts.pairs["m.{}.default.weight"]
    assert np.array_equal(square.a, ARRAYS["m.lora_A.default.weight"])
    assert np.array_equal(square.b, ARRAYS["m.lora_B.default.weight"])
    assert square.scaling == 0.5
    back = put_together(parts)
    assert back.keys() == ARRAYS.keys()
    assert all(np.array_equal(back[name], array) for name, array in ARRAYS.items())


def test_merging_by_name_keeps_the_product() -> None:
    parts = take_apart(ARRAYS, SCALINGS)
    merged = LoraArrays(
        {
            key: merge_in_product_space([one, one], [0.5, 0.5], 2, 2.0, Split.BALANCED)
            for key, one in parts.pairs.items()
        },
        {},
    )
    arrays = put_together(merged)
    product = 2.0 * arrays[f"{PREFIX}.lora_B.weight"] @ arrays[f"{PREFIX}.lora_A.weight"]
    expected = 2.0 * ARRAYS[f"{PREFIX}.lora_B.weight"] @ ARRAYS[f"{PREFIX}.lora_A.weight"]
    assert np.allclose(product, expected, atol=1e-5)


def test_incomplete_adapters_are_refused() -> None:
    half = {name: array for name, array in ARRAYS.items() if name != "m.lora_B.default.weight"}
    with pytest.raises(UpdateError, match=r"without 'm\.lora_B"):
        take_apart(half, SCALINGS)
    with pytest.raises(UpdateError, match="no scaling for module 'm'"):
        take_apart(ARRAYS, {PREFIX: 2.0})
    with pytest.raises(UpdateError, match="are needed"):
        take_apart({"m.lora_A.w": np.ones(3, np.float32), "m.lora_B.w": np.ones(3, np.float32)}, SCALINGS)
    with pytest.raises(UpdateError, match="braces"):
        take_apart({"m{0}.lora_A.w": np.ones((3, 3), np.float32)}, SCALINGS)
