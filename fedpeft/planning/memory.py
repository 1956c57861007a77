"""How much memory a client's process needs, estimated from shapes.

With N = batch size x tokens of the longest row (virtual tokens included), S the scored tokens among them, L
layers, h the hidden size, k the width of keys (and of values), m the feed-forward width, a attention heads, T
tokens and V the vocabulary, the backward pass finds these numbers kept by the forward pass:

    layers   L N (6 h + 2 k + 4 m)   inputs and outputs of norms (4 h), queries, keys, values and attention's
                                     output (2 h + 2 k), the gated feed-forward block (4 m; 2 m without gate)
           + L N 3 a T               attention weights, only where attention drops out or is not fused
    head     2 N V + 2 S V           logits, log-probabilities and the gradients of both (language models)

Under gradient checkpointing the first line is L N h for the blocks' inputs, plus one layer's own share. A
number takes 4 bytes, under bf16 autocast 3 on average (norms and the residual stream stay float32). On a base
of 16 bits it takes 5: norms compute in float32, and each adapted layer keeps a float32 copy of its own input.

Evaluation, and training without a backward pass, keep one layer at a time: N V + 2 S V + N (4 h + 3 m), and
of language models the key-value cache 2 L k (T + new tokens) per row, which their forward pass always fills.

Source: the accounting per layer follows Korthikanti et al. 2022, section 4.1, redone for float32, fused
attention and frozen weights (a frozen linear layer keeps no input for itself; the adapter beside it does).

Resident memory exceeds what is alive: glibc keeps freed blocks below 32 MiB in its heap, where blocks of
other sizes leave gaps. `allocator` allows for it with 130% of the largest phase while single tensors are that
small. A quantised base, or one of 32 million parameters, is loaded with a fixed threshold of 1 MiB instead
(`fedpeft.models.quantization`), and nothing is added for it.

Gradients grow in the backward pass as activations go, so the larger of the two counts, unless micro-batches
accumulate. A fused update holds the largest parameter's gradient alone; sampled layers have gradients and
moments in the largest layers that can be drawn together, and activations as if all trained.

Under record-level privacy one row at a time goes through the model. DP-SGD holds that row's gradient, the sum
of clipped ones in int64, and while it clips, the largest parameter's in float64 and int64.

Tolerance, measured by the tests on Llama models of 0.26 and 0.8 million parameters with LoRA on all linear
layers: what is alive within 25%; resident growth between 0.75 of what is alive and 1.25 of the whole.
Adapters on fewer layers keep less than this. Processes that load and train on a quantised Llama of 98 million
parameters: within 15% of their peak (`simulations/bench_memory.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fedpeft.config.sections import RecordLevelPrivacy, RunConfig, TrainingSection
from fedpeft.data.federated import FederatedData
from fedpeft.evaluation.metrics import METRICS
from fedpeft.models.sketch import Shape, Weights, weights_of
from fedpeft.rounds.strategy_table import proximal_mu
from fedpeft.training.eight_bit import count_kept_bytes
from fedpeft.training.layers import layer_of
from fedpeft.training.projected_adam import count_kept_numbers
from fedpeft.training.zeroth_rules import RULES

_FLOAT = 4
_HEAP_BLOCK = 32 * 2**20  # glibc's largest threshold from which a block is a mapping of its own
_HEAP_GAPS = 1.3  # share of live bytes; measured 0.3 to 1.4 on models below a million parameters
_GATES = ("gate_proj", "gate_up_proj", "w3")  # how gated feed-forward blocks name the extra layer

_SUMMED = 2  # DP-SGD: clipped sums in int64, in parameters' own size
_CLIPPED = 6  # and its scratch: one gradient in float64, scaled, and rounded in int64

# Beside the parameters themselves, in their size: the state that came; or theta_0 and int32 or int64 sums.
_STATE_NUMBERS = {"adapter-delta": 1, "seed-scalars": 2, "projected": 3}


@dataclass(frozen=True)
class Memory:
    """Estimated bytes of one process that works for clients, one client at a time.

    Attributes:
        base: frozen weights and buffers; forked worker processes share these pages.
        adapter: trainable parameters.
        state: the global state as it came.
        gradients: of the trainable parameters.
        optimizer: what the optimiser keeps between steps.
        proximal: FedProx's copy of the start.
        activations: kept by the forward pass for the backward pass, for the longest batch there can be.
        exchange: copies while an update is expressed and encoded; training's memory is free again by then.
        evaluation: one evaluation batch.
        overlap: of gradients and activations, which are never all there: as the backward pass makes the
            first, it drops the second. Zero where micro-batches accumulate.
        allocator: freed memory that the C library may hold.
        peak: base, adapter, state, the largest phase and the allocator's share.
    """

    base: int
    adapter: int
    state: int
    gradients: int
    optimizer: int
    proximal: int
    activations: int
    exchange: int
    evaluation: int
    overlap: int
    allocator: int
    peak: int

    @property
    def phases(self) -> tuple[int, int, int]:
        """Training, exchange, evaluation: never at the same time."""
        training = self.gradients + self.optimizer + self.proximal + self.activations - self.overlap
        return training, self.exchange, self.evaluation


@dataclass(frozen=True)
class ModelSizes:
    """The sizes that activations depend on; see the module for the letters."""

    layers: int
    hidden: int
    keys: int
    inner: int
    gated: bool
    heads: int
    vocabulary: int
    virtual_tokens: int
    fused_attention: bool


@dataclass(frozen=True)
class BatchShape:
    """The largest batch there can be: rows, tokens of the longest row, scored tokens in all."""

    rows: int
    tokens: int
    scored: int


def estimate_memory(
    run: RunConfig,
    model: nn.Module,
    data: FederatedData,
    metrics: tuple[str, ...],
    weights: Weights | None = None,
) -> Memory:
    """Estimate; see the module. Tuners that build whole weight matrices (BOFT, LoHa, OFT) need more.

    Args:
        weights: of a model that is only sketched; else they are measured.
    """
    weights = weights_of(model) if weights is None else weights
    adapter = _float_bytes(weights.shapes.values())
    training = run.training
    shapes = list_trained_at_once(training, weights.shapes)
    trains = training.kind != "none"
    backward = trains and (training.kind != "zeroth-order" or RULES[training.rule].above)
    geometry = geometry_of(model)
    language = run.model.task == "causal-lm"
    batch = training_batch(training, data)
    private = isinstance(run.privacy, RecordLevelPrivacy)
    if private:
        batch = BatchShape(1, batch.tokens, -(-batch.scored // batch.rows))
    if backward:
        half = run.model.dtype == "bfloat16" and run.model.quantization == "none"
        kept = activations(geometry, batch, training, language, half_base=half)
    else:
        kept = forward_bytes(geometry, batch, language)
    alive = kept if trains else 0
    scratch = weights.unpacked + (weights.castable if training.precision == "bf16" else 0)
    parts = {
        "base": weights.frozen,
        "adapter": adapter,
        "state": _STATE_NUMBERS.get(run.space.kind, 1) * adapter,
        "gradients": _gradients(training, shapes, private) if backward else adapter * _copies(training),
        "optimizer": optimizer_bytes(training, shapes) if backward else 2 * _dense(training) * adapter,
        "proximal": adapter if trains and proximal_mu(run.federation.strategy) else 0,
        "activations": alive + scratch if trains else 0,
        "exchange": 2 * adapter,  # the difference and its message; or weights to take a fingerprint of
        "evaluation": evaluation_bytes(geometry, run, data, metrics) + weights.unpacked,
    }
    both = min(_float_bytes(shapes) if private else parts["gradients"], parts["activations"])
    parts["overlap"] = both if backward and training.gradient_accumulation == 1 else 0
    draft = Memory(**parts, allocator=0, peak=0)
    phase = max(draft.phases)
    largest = (
        _FLOAT
        * (1 if private else training.batch_size)
        * int(data.rows.lengths.max(initial=1))
        * max(geometry.inner, geometry.hidden)
    )
    gaps = largest < _HEAP_BLOCK and not weights.lean
    allocator = int(_HEAP_GAPS * phase) if gaps else 0
    peak = draft.base + draft.adapter + draft.state + phase + allocator
    return Memory(**parts, allocator=allocator, peak=peak)


def on_gpu(memory: Memory, run: RunConfig) -> Memory:
    """What of it lies on a GPU: adapter states and messages are of main memory, and no heap has gaps there.

    Kernels and the CUDA context, some hundred MiB, come on top.
    """
    state = 0 if run.space.kind == "adapter-delta" else memory.state
    part = replace(memory, state=state, exchange=0, allocator=0)
    return replace(part, peak=part.base + part.adapter + part.state + max(part.phases))


def list_trained_at_once(training: TrainingSection, shapes: Mapping[str, Shape]) -> list[Shape]:
    """Shapes of the parameters that one step moves: all, or those of the largest layers that are sampled."""
    if training.kind != "first-order" or training.sampled_layers is None:
        return list(shapes.values())
    layers: dict[int | None, list[Shape]] = {}
    for name, shape in shapes.items():
        layers.setdefault(layer_of(name), []).append(shape)
    outside = layers.pop(None, [])
    largest = sorted(layers.values(), key=_float_bytes, reverse=True)[: training.sampled_layers]
    return [*outside, *(shape for layer in largest for shape in layer)]


def _gradients(training: TrainingSection, shapes: Collection[Shape], private: bool) -> int:
    """All gradients together, or the largest where each is dropped once it has moved its parameter.

    Args:
        private: rows' gradients are clipped one by one and summed.
    """
    if private:
        largest = max((_float_bytes([shape]) for shape in shapes), default=0)
        return (1 + _SUMMED) * _float_bytes(shapes) + _CLIPPED * largest
    fused = training.kind == "first-order" and training.fused_update
    return max((_float_bytes([s]) for s in shapes), default=0) if fused else _float_bytes(shapes)


def _float_bytes(shapes: Iterable[Shape]) -> int:
    return _FLOAT * sum(math.prod(shape) for shape in shapes)


def _dense(training: TrainingSection) -> bool:
    """A zeroth-order rule that sums its estimate into gradients, for Adam's two moments at most."""
    return training.kind == "zeroth-order" and RULES[training.rule].dense is not None


def _copies(training: TrainingSection) -> bool:
    """Whether a zeroth-order rule holds something as large as the adapter: an estimate, a direction."""
    rule = RULES[training.rule]
    needs = rule.dense is not None or rule.measure == "tangent" or rule.step == "best-of-three"
    return training.kind == "zeroth-order" and needs


def activations(
    geometry: ModelSizes,
    batch: BatchShape,
    training: TrainingSection,
    language: bool,
    *,
    half_base: bool = False,
) -> int:
    """Bytes that one micro-batch keeps for its backward pass, by the module's formula.

    Args:
        half_base: the base is of 16 bits, and the adapter is not.
    """
    g, length = geometry, batch.tokens + geometry.virtual_tokens
    tokens = batch.rows * length
    layer = 6 * g.hidden + 2 * g.keys + (4 if g.gated else 2) * g.inner
    if not g.fused_attention:
        layer += 3 * g.heads * length
    per_token = g.layers * g.hidden + layer if training.gradient_checkpointing else g.layers * layer
    if training.activation_offload:  # what one layer is about to hand over, or to get back
        per_token = layer
    number = 3 if training.precision == "bf16" else 5 if half_base else _FLOAT
    head = 2 * (tokens + batch.scored) * g.vocabulary if language else 0
    return number * tokens * per_token + _FLOAT * head


def evaluation_bytes(
    geometry: ModelSizes, run: RunConfig, data: FederatedData, metrics: tuple[str, ...]
) -> int:
    """Bytes of one evaluation batch without gradients, by the module's formula."""
    if not len(data.test):
        return 0
    encoded = data.test
    rows = min(run.evaluation.batch_size, len(encoded))
    batch = BatchShape(rows, int(encoded.lengths.max()), rows * int(encoded.loss_tokens.max()))
    generates = any(METRICS[name].generates for name in metrics)
    new_tokens = run.evaluation.max_new_tokens if generates else 0
    return forward_bytes(geometry, batch, run.model.task == "causal-lm", new_tokens)


def forward_bytes(geometry: ModelSizes, batch: BatchShape, language: bool, new_tokens: int = 0) -> int:
    """Bytes of one batch's forward pass without gradients, by the module's formula."""
    g, length = geometry, batch.tokens + geometry.virtual_tokens
    tokens = batch.rows * length
    size = tokens * (4 * g.hidden + 3 * g.inner)
    if language:
        size += (tokens + 2 * batch.scored) * g.vocabulary
        size += 2 * g.layers * g.keys * batch.rows * (length + new_tokens)
    return _FLOAT * size


def training_batch(training: TrainingSection, data: FederatedData) -> BatchShape:
    """The largest micro-batch that a client can draw: as many rows as it has, all as long as its longest."""
    lengths, scored = data.rows.lengths, data.rows.loss_tokens
    shapes = []
    for client in (client for client in data.clients if len(client.train)):
        rows = min(training.batch_size, len(client.train))
        longest = int(lengths[client.train].max())
        shapes.append(BatchShape(rows, longest, rows * int(scored[client.train].max())))
    return max(
        shapes, key=lambda shape: (shape.rows * shape.tokens, shape.scored), default=BatchShape(1, 1, 1)
    )


def geometry_of(model: nn.Module) -> ModelSizes:
    """Read the sizes from the base model's configuration, by the names that `transformers` uses."""
    wrapped: Any = model
    config = wrapped.get_base_model().config
    table: dict[str, Any] = config.to_dict()

    def size(*names: str, default: int) -> int:
        return next((int(table[name]) for name in names if table.get(name)), default)

    hidden = size("hidden_size", "n_embd", "dim", "d_model", default=0)
    heads = size("num_attention_heads", "n_head", "n_heads", default=1)
    head = size("head_dim", default=hidden // heads)
    drops = [table.get(key) for key in ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop")]
    return ModelSizes(
        layers=size("num_hidden_layers", "n_layer", "n_layers", default=1),
        hidden=hidden,
        keys=head * size("num_key_value_heads", default=heads),
        inner=size("intermediate_size", "n_inner", "hidden_dim", "ffn_dim", default=4 * hidden),
        gated=any(name.rpartition(".")[2] in _GATES for name, _ in model.named_modules()),
        heads=heads,
        vocabulary=size("vocab_size", default=0),
        virtual_tokens=int(getattr(wrapped.peft_config["default"], "num_virtual_tokens", None) or 0),
        fused_attention=config._attn_implementation != "eager" and not any(drops),
    )


def optimizer_bytes(training: TrainingSection, shapes: list[Shape]) -> int:
    """Bytes that the named optimiser keeps between steps for float32 parameters of these shapes."""
    keeps = OPTIMIZER_BYTES[training.optimizer]
    return sum(keeps(shape, training) for shape in shapes)


def _all(copies: int) -> Callable[[Shape, TrainingSection], int]:
    return lambda shape, training: _FLOAT * copies * math.prod(shape)


def _with_momentum(copies: int) -> Callable[[Shape, TrainingSection], int]:
    return lambda shape, training: _FLOAT * (copies + bool(training.momentum)) * math.prod(shape)


def _count_factored(shape: Shape, training: TrainingSection) -> int:
    """Adafactor keeps a row and a column of each matrix (the last two dimensions), and all of a vector."""
    if len(shape) < 2:
        return _FLOAT * math.prod(shape)
    return _FLOAT * math.prod(shape[:-2]) * (shape[-2] + shape[-1])


OPTIMIZER_BYTES: Mapping[str, Callable[[Shape, TrainingSection], int]] = {
    "sgd": _with_momentum(0),
    "adam": _all(2),
    "adamw": _all(2),
    "adagrad": _all(1),
    "adafactor": _count_factored,
    "rmsprop": _with_momentum(1),
    "galore": lambda shape, training: _FLOAT * count_kept_numbers(shape, training.projection_rank),
    **{
        name: lambda shape, training, name=name: count_kept_bytes(name, math.prod(shape))  # type: ignore[misc]  # bound now
        for name in ("adamw8bit", "paged-adamw", "paged-adamw8bit")
    },
}
"""Bytes that an optimiser keeps between steps for one parameter of a shape."""
