"""Just-in-time forwards against a model whose perturbed weights exist."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedpeft.errors import ModelError, TrainingError, UpdateError
from fedpeft.seedspace.digest import digest
from fedpeft.seedspace.jit_perturb import JustInTime
from fedpeft.seedspace.layout import CounterStream, tensor_ids
from fedpeft.seedspace.perturb import perturb, prepare
from fedpeft.seedspace.trainable_tensors import materialise, trainable_parameters, trainable_shapes

STREAM, DIRECTION, SCALE = CounterStream(11), 6, 1e-2


class Scaled(nn.Module):
    """A module that reads parameters out of a container, and one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterDict({"default": nn.Parameter(torch.rand(24))})
        self.shift = nn.Parameter(torch.rand(24))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = inputs * self.scales["default"] + self.shift
        return result


class Small(nn.Module):
    """Tied embedding and head, norms, biases, a convolution, attention, a container."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 24)
        self.limited = nn.Embedding(300, 24, max_norm=0.5)
        self.conv = nn.Conv1d(24, 24, 1)
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.scaled = Scaled()
        self.norm = nn.LayerNorm(24)
        self.hidden = nn.Linear(24, 40)
        self.back = nn.Linear(40, 24)
        self.head = nn.Linear(24, 300, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens) + self.limited(tokens)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.norm(self.scaled(x))
        logits: torch.Tensor = self.head(x + self.back(self.hidden(x).relu()))
        return logits


def small(dtype: torch.dtype = torch.float32) -> Small:
    torch.manual_seed(0)
    return Small().to(dtype).eval()


TOKENS = torch.tensor([[3, 1, 299, 3], [0, 7, 7, 12]])


def both(
    model: nn.Module, block_bytes: int, call: Callable[[nn.Module], torch.Tensor] = lambda m: m(TOKENS)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs just in time and with materialised weights."""
    ids = tensor_ids(trainable_shapes(model))
    with torch.no_grad():
        with JustInTime(model, ids, STREAM, block_bytes=block_bytes).at(DIRECTION, SCALE):
            ours = call(model)
        copies = materialise(model, ids, STREAM, DIRECTION, SCALE)
        kept = {name: p for name, p in model.named_parameters(remove_duplicate=False) if name in copies}
        originals = {name: p.data for name, p in kept.items()}
        for name, parameter in kept.items():
            parameter.data = copies[name]
        theirs = call(model)
        for name, parameter in kept.items():
            parameter.data = originals[name]
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_whole_layers_give_the_bits_of_the_materialised_model(dtype: torch.dtype) -> None:
    model = small(dtype)
    ours, theirs = both(model, block_bytes=2**30)
    assert ours.equal(theirs)
    with torch.no_grad():
        assert not ours.equal(model(TOKENS))


@pytest.mark.parametrize("block_bytes", [1, 1000, 24 * 4 * 128])
def test_row_blocks_differ_by_the_order_of_a_product_at_most(block_bytes: int) -> None:
    """The same weights enter; a library may order the sum of 24 products by shape: 24 ulps of the result."""
    ours, theirs = both(small(), block_bytes)
    torch.testing.assert_close(ours, theirs, rtol=24 * 2.0**-23, atol=1e-5)


@pytest.mark.parametrize(
    "trainable",
    [
        lambda name: "norm" in name,
        lambda name: name.endswith("bias"),
        lambda name: name == "hidden.weight",
        lambda name: name in ("table.weight", "head.weight"),
        lambda name: name.startswith("scaled"),
        lambda name: name.startswith("attention"),
    ],
)
def test_only_the_trainable_set_moves(trainable: Callable[[str], bool]) -> None:
    model = small()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(trainable(name))
    ours, theirs = both(model, block_bytes=2**30)
    assert ours.equal(theirs)
    with torch.no_grad():
        assert not ours.equal(model(TOKENS))


def test_tied_weights_are_one_tensor_under_the_smallest_name() -> None:
    names = trainable_parameters(small())
    assert "head.weight" in names
    assert "table.weight" not in names


def test_weights_and_forwards_are_as_before_whatever_happens() -> None:
    model = small()
    ids = tensor_ids(trainable_shapes(model))
    with torch.no_grad():
        plain = model(TOKENS)  # `max_norm` writes the looked-up rows once; from here on nothing moves
        before = digest(dict(model.named_parameters()))
        with JustInTime(model, ids, STREAM).at(DIRECTION, SCALE):
            model(TOKENS)
            assert digest(dict(model.named_parameters())) == before
        with pytest.raises(IndexError), JustInTime(model, ids, STREAM).at(DIRECTION, SCALE):
            model(torch.tensor([[300]]))
        assert model(TOKENS).equal(plain)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_weights_may_change_and_move_between_two_evaluations() -> None:
    """In place, as a step does; to other memory, as loading does; to another type."""
    model = small()
    ids = tensor_ids(trainable_shapes(model))
    jit = JustInTime(model, ids, STREAM, block_bytes=24 * 4 * 128)

    def outputs() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            with jit.at(DIRECTION, SCALE):
                again = model(TOKENS)
            with JustInTime(model, ids, STREAM, block_bytes=24 * 4 * 128).at(DIRECTION, SCALE):
                return again, model(TOKENS)

    seen = [outputs()[0]]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)

    def replaced() -> None:
        for parameter in model.parameters():
            parameter.data = parameter.data * 1.5

    changes: list[Callable[[], object]] = [lambda: None, replaced, model.double]
    for change in changes:
        change()
        again, fresh = outputs()
        assert again.equal(fresh)
        assert not any(again.equal(earlier) for earlier in seen)
        seen.append(again)


def test_a_prepared_perturbation_is_the_perturbation() -> None:
    """Blocks that begin within a sign block, all types, strided weights."""
    weights = torch.randn(40, 33)
    for part in (weights, weights.double(), weights.bfloat16(), weights.half(), weights.t(), weights[::2]):
        for start in (0, 64, 131):
            shift = prepare(STREAM, 3, part, start=start)
            for direction, scale in ((0, 1e-2), (5, -1e-2)):
                out = torch.empty(part.shape, dtype=part.dtype)
                shift(direction, scale, out)
                assert out.equal(perturb(STREAM, 3, direction, part, scale, start=start))
    with pytest.raises(TrainingError, match="floating-point"):
        prepare(STREAM, 3, torch.ones(3, dtype=torch.int64))


def test_looked_up_rows_must_exist() -> None:
    table = nn.Embedding(10, 4)
    with torch.no_grad(), JustInTime(table, {"weight": 0}, STREAM).at(DIRECTION, SCALE):
        for token in (10, -1):
            with pytest.raises(IndexError):
                table(torch.tensor([token]))


def test_a_scale_that_is_not_finite_is_refused() -> None:
    jit = JustInTime(nn.Linear(2, 2), {"weight": 1, "bias": 0}, STREAM)
    with torch.no_grad(), pytest.raises(UpdateError, match="not finite"), jit.at(DIRECTION, float("nan")):
        pass


def test_opposite_scales_lie_on_opposite_sides() -> None:
    """(f(+) - f(-)) / 2 scale is the directional derivative, here of a linear model in its weights: exact."""
    model = nn.Linear(64, 3, bias=False).double()
    ids, x = tensor_ids(trainable_shapes(model)), torch.randn(5, 64, dtype=torch.float64)
    jit = JustInTime(model, ids, STREAM)
    with torch.no_grad():
        with jit.at(DIRECTION, 0.5):
            above = model(x)
        with jit.at(DIRECTION, -0.5):
            below = model(x)
        signs = materialise(model, ids, STREAM, DIRECTION, 1.0)["weight"] - model.weight
    torch.testing.assert_close(above - below, x @ signs.T)
    assert signs.abs().allclose(torch.ones(()).double())


def test_hooks_run_once() -> None:
    model, calls = small(), []
    model.norm.register_forward_hook(lambda *_: calls.append("norm"))
    model.hidden.register_forward_pre_hook(lambda *_: calls.append("hidden"))
    ids = tensor_ids(trainable_shapes(model))
    with torch.no_grad(), JustInTime(model, ids, STREAM).at(DIRECTION, SCALE):
        model(TOKENS)
    assert sorted(calls) == ["hidden", "norm"]


def test_a_forward_that_someone_replaced_is_kept() -> None:
    """As libraries do that move a layer's inputs between devices."""
    model = small()
    original = model.hidden.forward
    model.hidden.forward = lambda inputs: original(inputs) * 2  # type: ignore[method-assign,assignment]  # per instance
    ours, theirs = both(model, block_bytes=2**30)
    assert ours.equal(theirs)
    assert "forward" in model.hidden.__dict__


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns, other than the given ones themselves."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self.numel = 0
        self.known = {tensor.data_ptr() for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.data_ptr() not in self.known:
            self.numel = max(self.numel, result.numel())
        return result


def test_extra_memory_is_a_row_block_not_a_layer() -> None:
    head = nn.Sequential(nn.Embedding(4096, 64), nn.Linear(64, 4096, bias=False))
    head[1].weight = head[0].weight
    ids = tensor_ids(trainable_shapes(head))
    jit = JustInTime(head, ids, STREAM, block_bytes=2**14)
    with torch.no_grad(), jit.at(DIRECTION, SCALE), Largest(head.parameters()) as largest:
        head(torch.tensor([[1, 2, 3]]))
    assert largest.numel == 3 * 4096  # the logits


def test_lora_over_a_frozen_base() -> None:
    peft = pytest.importorskip("peft")
    for method in (
        peft.LoraConfig(r=2, target_modules=["hidden", "back"], init_lora_weights=False),
        peft.LoraConfig(r=2, target_modules=["hidden"], init_lora_weights=False, use_dora=True),
        peft.LoraConfig(r=2, target_modules=["table"], init_lora_weights=False),
        peft.IA3Config(target_modules=["hidden"], feedforward_modules=[], init_ia3_weights=False),
    ):
        wrapped = peft.get_peft_model(small(), method).eval()
        ours, theirs = both(wrapped, block_bytes=2**30)
        assert ours.equal(theirs), method
        with torch.no_grad():
            assert not ours.equal(wrapped(TOKENS)), method


def test_a_causal_language_model() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(config).eval()
    ours, theirs = both(model, 2**30, lambda m: m(input_ids=TOKENS % 260, use_cache=False).logits)
    assert ours.equal(theirs)
    ours, theirs = both(model, 2**11, lambda m: m(input_ids=TOKENS % 260, use_cache=False).logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_refusals() -> None:
    model = small()
    ids = tensor_ids(trainable_shapes(model))
    with (
        pytest.raises(TrainingError, match="no_grad"),
        JustInTime(model, ids, STREAM).at(DIRECTION, SCALE),
    ):
        pass
    model.norm.weight.requires_grad_(False)
    with pytest.raises(ModelError, match=r"norm\.weight"):
        JustInTime(model, ids, STREAM)
