"""The wire state: names, copies, refusals, and the digest of what is frozen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedpeft.errors import ModelError
from fedpeft.models.trainable import (
    count_parameters,
    digest_frozen,
    get_arrays,
    set_arrays,
    trainable_parameters,
)


class Pair(nn.Module):
    """Two layers, the second frozen, and a buffer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(3, 2)
        self.first = nn.Linear(2, 3)
        self.second.requires_grad_(False)
        self.register_buffer("kept", torch.arange(4, dtype=torch.bfloat16))
        self.register_buffer("passing", torch.arange(4), persistent=False)
        for count, parameter in enumerate(self.parameters()):
            parameter.data = torch.arange(parameter.numel()).reshape(parameter.shape) + 10.0 * count


def test_names_are_sorted_and_only_the_trained_are_there() -> None:
    assert list(trainable_parameters(Pair())) == ["first.bias", "first.weight"]
    assert count_parameters(Pair()) == (9, 17)


def test_arrays_are_copies() -> None:
    model = Pair()
    arrays = get_arrays(model)
    assert {name: (a.shape, a.dtype.name) for name, a in arrays.items()} == {
        "first.bias": ((3,), "float32"),
        "first.weight": ((3, 2), "float32"),
    }
    arrays["first.bias"][:] = 99
    assert model.first.bias.tolist() == [30, 31, 32]


def test_set_writes_in_place_and_keeps_the_parameters() -> None:
    model = Pair()
    before = model.first.weight
    read_only = np.ones((3, 2))
    read_only.setflags(write=False)
    set_arrays(model, {"first.weight": read_only, "first.bias": np.zeros(3, np.float32)})
    assert model.first.weight is before
    assert before.tolist() == [[1, 1]] * 3
    assert before.requires_grad


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"first.bias": np.zeros(3)}, "misses array 'first.weight'"),
        (
            {"first.bias": np.zeros(3), "first.weight": np.zeros((3, 2)), "x": np.zeros(1)},
            "unknown array 'x'",
        ),
        (
            {"first.bias": np.zeros(3), "first.weight": np.zeros((2, 3))},
            r"shape \(2, 3\), the model needs \(3, 2\)",
        ),
        ({"first.bias": np.zeros(3), "first.weight": np.zeros(6)}, r"shape \(6,\)"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(arrays: dict[str, np.ndarray], said: str) -> None:
    model = Pair()
    with pytest.raises(ModelError, match=said):
        set_arrays(model, arrays)
    assert model.first.bias.tolist() == [30, 31, 32]


def test_the_digest_sees_what_is_frozen_and_nothing_else() -> None:
    model = Pair()
    digest = digest_frozen(model)
    assert digest_frozen(Pair()) == digest
    assert len(digest) == 64
    with torch.no_grad():
        model.first.weight += 1
        model.get_buffer("passing").add_(1)
    assert digest_frozen(model) == digest
    with torch.no_grad():
        model.second.weight[1, 2] += 1e-6 * model.second.weight[1, 2]
    assert digest_frozen(model) != digest


def test_the_digest_sees_persistent_buffers_dtypes_shapes_and_names() -> None:
    digest = digest_frozen(Pair())
    bump, recast, reshaped = Pair(), Pair(), Pair()
    bump.get_buffer("kept")[0] = 5
    recast.kept = recast.get_buffer("kept").view(torch.int16)
    reshaped.kept = reshaped.get_buffer("kept").reshape(2, 2)
    assert len({digest, *(digest_frozen(m) for m in (bump, recast, reshaped))}) == 4
    renamed = nn.ModuleDict({"second": Pair().second, "other": Pair().first})
    plain = nn.ModuleDict({"third": Pair().second, "other": Pair().first})
    assert digest_frozen(renamed) != digest_frozen(plain)


def test_the_digest_of_a_tensor_larger_than_a_chunk_covers_its_end() -> None:
    model = nn.Embedding(5_000_000, 1)
    model.requires_grad_(False)
    digest = digest_frozen(model)
    with torch.no_grad():
        model.weight[-1] += 1
    assert digest_frozen(model) != digest
