"""Every merging rule against loops, and the cases where released code goes wrong."""

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.adapters import (
    METHODS,
    AdapterStack,
    Average,
    Breadcrumbs,
    DareMerge,
    Lines,
    Pcb,
    TaskArithmetic,
    Ties,
    adapter_stack,
    best_on_held_out,
    merger_named,
    scale_blocks,
)
from fedpeft.adapters.lines import block_index
from fedpeft.codec.masks import BernoulliMask, PublicSource, tensor_stream
from fedpeft.codec.topk import count_selected
from fedpeft.errors import UpdateError
from tests.merging import oracles

Array = npt.NDArray[np.float32]
SHAPES = {"layers.0.lora_A": (2, 5), "layers.2.lora_B": (4, 2), "head": (), "empty": (0, 3), "one": (1,)}


@st.composite
def stacks(draw: st.DrawFn) -> AdapterStack:
    """One to four adapters of small integers (many ties and exact cancellations) or normals."""
    count, seed = draw(st.integers(1, 4)), draw(st.integers(0, 2**32))
    rng = np.random.default_rng(seed)
    whole = draw(st.booleans())
    adapters = [
        {
            name: np.asarray(rng.integers(-2, 3, shape) if whole else rng.standard_normal(shape)).astype(
                np.float32
            )
            for name, shape in SHAPES.items()
        }
        for _ in range(count)
    ]
    weights = draw(
        st.one_of(st.none(), st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=count, max_size=count))
    )
    return adapter_stack(adapters, weights)


def rows(stack: AdapterStack, name: str) -> list[list[float]]:
    return [adapter[name].reshape(-1).tolist() for adapter in stack.adapters]


def check(merged: dict[str, Array], expected: dict[str, list[float]], stack: AdapterStack) -> None:
    assert merged.keys() == SHAPES.keys()
    for name, shape in SHAPES.items():
        assert merged[name].shape == shape
        assert merged[name].dtype == np.float32
        assert merged[name].reshape(-1).tolist() == pytest.approx(expected[name], rel=2e-6, abs=1e-7), name


@settings(deadline=None, max_examples=40)
@given(stacks())
def test_linear_rules(stack: AdapterStack) -> None:
    sums = {name: oracles.weighted_sum(rows(stack, name), stack.weights) for name in SHAPES}
    total = sum(stack.weights)
    check(Average().merge(stack), {name: [v / total for v in row] for name, row in sums.items()}, stack)
    check(
        TaskArithmetic(0.3).merge(stack), {name: [0.3 * v for v in row] for name, row in sums.items()}, stack
    )


@settings(deadline=None, max_examples=100)
@given(stacks(), st.sampled_from([0.1, 0.2, 0.5, 1.0]))
def test_ties(stack: AdapterStack, density: float) -> None:
    kept = {name: count_selected(math.prod(shape), density) for name, shape in SHAPES.items()}
    expected = oracles.ties({name: rows(stack, name) for name in SHAPES}, stack.weights, kept)
    check(
        Ties(density, lam=0.7).merge(stack),
        {name: [0.7 * v for v in row] for name, row in expected.items()},
        stack,
    )


@settings(deadline=None, max_examples=60)
@given(stacks(), st.sampled_from([(0.9, 0.1), (0.5, 0.0), (1.0, 0.0), (0.2, 0.3)]))
def test_breadcrumbs(stack: AdapterStack, parts: tuple[float, float]) -> None:
    density, gamma = parts
    expected = {}
    for name, shape in SHAPES.items():
        size = math.prod(shape)
        top = int(gamma * size)
        kept = min(count_selected(size, density), size - top)
        expected[name] = [0.5 * v for v in oracles.breadcrumbs(rows(stack, name), stack.weights, top, kept)]
    check(Breadcrumbs(density, gamma, lam=0.5).merge(stack), expected, stack)


@settings(deadline=None, max_examples=60)
@given(stacks(), st.sampled_from([0.1, 0.4, 1.0]))
def test_pcb(stack: AdapterStack, density: float) -> None:
    expected: dict[str, list[float]] = {}
    for name, shape in SHAPES.items():
        size = math.prod(shape)
        expected[name] = (
            oracles.pcb(rows(stack, name), stack.weights, count_selected(size, density)) if size else []
        )
    check(Pcb(density).merge(stack), expected, stack)


def test_pcb_clamps_outliers_of_large_tensors() -> None:
    rng = np.random.default_rng(0)
    adapters = [{"w": rng.standard_normal(25_000).astype(np.float32)} for _ in range(2)]
    for adapter in adapters:
        adapter["w"][7] = 1000.0
    merged = Pcb(1.0).merge(adapter_stack(adapters))["w"]
    # Ranks floor(1e-4 x 25000) = 2 from the top bound every magnitude.
    bounds = [np.sort(np.abs(adapter["w"]))[-3] for adapter in adapters]
    assert min(bounds) * 0.999 <= merged[7] <= max(bounds) * 1.001


@settings(deadline=None, max_examples=30)
@given(stacks(), st.sampled_from([0.0, 0.5, 0.9]))
def test_dare(stack: AdapterStack, drop_rate: float) -> None:
    expected = {}
    for name, shape in SHAPES.items():
        size = math.prod(shape)
        thinned = []
        for task, row in enumerate(rows(stack, name)):
            threshold = int((1 - drop_rate) * 2**64)
            kept = BernoulliMask(PublicSource(5, task, tensor_stream(name)), threshold).indices(size)
            thinned.append([v / (1 - drop_rate) for v in oracles.masked(row, kept.tolist())])
        expected[name] = oracles.weighted_sum(thinned, stack.weights)
    check(DareMerge(seed=5, drop_rate=drop_rate).merge(stack), expected, stack)


def test_dare_masks_differ_by_task_and_repeat_by_seed() -> None:
    same = {"w": np.ones(1000, dtype=np.float32)}
    pair = adapter_stack([same, same])
    first = DareMerge(seed=1, drop_rate=0.5).merge(pair)["w"]
    assert np.array_equal(first, DareMerge(seed=1, drop_rate=0.5).merge(pair)["w"])
    assert not np.array_equal(first, DareMerge(seed=2, drop_rate=0.5).merge(pair)["w"])
    # One shared mask would leave only 0 and 4.
    assert set(first.tolist()) == {0.0, 2.0, 4.0}


def test_lines_scales_from_first_to_last_block() -> None:
    delta = {f"model.layers.{i}.experts.9.lora_A": np.ones(2, dtype=np.float32) for i in range(5)}
    delta["head"] = np.ones(1, dtype=np.float32)
    scaled = scale_blocks(delta, alpha=0.2, beta=0.8)
    for i in range(5):
        assert scaled[f"model.layers.{i}.experts.9.lora_A"].tolist() == pytest.approx([0.2 + 0.8 * i / 4] * 2)
    assert scaled["head"].tolist() == pytest.approx([0.2])
    wider = scale_blocks(delta, 0.2, 0.8, num_blocks=9)
    assert wider["model.layers.4.experts.9.lora_A"].tolist() == pytest.approx([0.6, 0.6])
    with pytest.raises(UpdateError, match="block 4 is named but the base has 4"):
        scale_blocks(delta, 0.2, 0.8, num_blocks=4)


def test_lines_of_one_block_does_not_divide_by_zero() -> None:
    assert scale_blocks({"h.0.w": np.ones(1, dtype=np.float32)}, 0.5, 9.0)["h.0.w"].tolist() == [0.5]


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("a.1.b.10.c", 1),
        ("layers.10.w", 10),
        ("0.w", 0),
        ("lora_1.w", None),
        ("w.3", None),
        ("head.weight", None),
    ],
)
def test_block_numbers_are_whole_components(name: str, block: int | None) -> None:
    assert block_index(name) == block


@settings(deadline=None, max_examples=30)
@given(stacks())
def test_lines_multi_task_alpha(stack: AdapterStack) -> None:
    sums = {name: oracles.weighted_sum(rows(stack, name), stack.weights) for name in SHAPES}
    plain = {name: oracles.weighted_sum(rows(stack, name), [1.0] * len(stack.adapters)) for name in SHAPES}
    norm, summed = (math.sqrt(sum(v * v for row in part.values() for v in row)) for part in (sums, plain))
    alpha = (summed / norm if norm else 1.0) / len(stack.adapters)
    # Blocks 0 and 2 of three; the rest lies outside blocks.
    factors = {name: alpha + (0.5 if "2" in name else 0.0) for name in SHAPES}
    check(
        Lines(beta=0.5).merge(stack),
        {name: [factors[name] * v for v in sums[name]] for name in SHAPES},
        stack,
    )


def test_ties_keeps_exactly_k_where_a_threshold_would_keep_every_tie() -> None:
    delta = np.zeros(10, dtype=np.float32)
    delta[3] = 1.0
    flat = np.ones(10, dtype=np.float32)
    assert np.count_nonzero(Ties(0.2).merge(adapter_stack([{"w": flat}]))["w"]) == 2
    assert Ties(1.0).merge(adapter_stack([{"w": delta}]))["w"].tolist() == delta.tolist()


def test_ties_and_breadcrumbs_do_not_lose_the_smaller_factor() -> None:
    rng = np.random.default_rng(0)
    adapter = {
        "lora_A": rng.standard_normal((8, 32)).astype(np.float32),
        "lora_B": (1e-4 * rng.standard_normal((32, 8))).astype(np.float32),
    }
    for merger in (Ties(0.05), Breadcrumbs(0.05, 0.01), Pcb(0.05)):
        assert merger.merge(adapter_stack([adapter]))["lora_B"].any()


def test_breadcrumbs_without_outliers_keeps_the_delta() -> None:
    delta = np.array([3.0, -1.0], dtype=np.float32)
    assert Breadcrumbs(1.0, 0.0, lam=1.0).merge(adapter_stack([{"w": delta}]))["w"].tolist() == [3.0, -1.0]
    assert Breadcrumbs(0.9, 0.01, lam=1.0).merge(adapter_stack([{"w": delta}]))["w"].any()


def test_an_exact_cancellation_takes_the_adapters_majority_sign() -> None:
    up = {"a": np.array([1.0, -1.0, -1.0], dtype=np.float32)}
    down = {"a": np.array([-1.0, -1.0, -1.0], dtype=np.float32)}
    assert Ties(1.0).merge(adapter_stack([up, down]))["a"].tolist() == [-1.0, -1.0, -1.0]


def test_what_cannot_be_merged_is_refused() -> None:
    one, two = np.ones(1, dtype=np.float32), np.ones(2, dtype=np.float32)
    with pytest.raises(UpdateError, match="at least one adapter"):
        adapter_stack([])
    with pytest.raises(UpdateError, match="tensor 'b'"):
        adapter_stack([{"a": one}, {"a": one, "b": one}])
    with pytest.raises(UpdateError, match="adapter 1: 'a'"):
        adapter_stack([{"a": one}, {"a": two}])
    with pytest.raises(UpdateError, match="NaN"):
        adapter_stack([{"a": one * np.float32(np.nan)}])
    for weights in ([1.0], [1.0, -1.0], [0.0, 0.0], [1.0, math.inf]):
        with pytest.raises(UpdateError, match="weights"):
            adapter_stack([{"a": one}, {"a": one}], weights)
    with pytest.raises(UpdateError, match="exceeds float32"):
        TaskArithmetic(1e30).merge(adapter_stack([{"a": one * np.float32(1e30)}]))


def test_rules_by_name() -> None:
    assert set(METHODS) == {"average", "task-arithmetic", "ties", "dare", "lines", "pcb", "breadcrumbs"}
    assert merger_named("ties", density=0.3) == Ties(0.3)
    assert merger_named("dare", seed=3) == DareMerge(seed=3)
    with pytest.raises(UpdateError, match="choose one of average"):
        merger_named("mean")
    with pytest.raises(UpdateError, match="gamma"):
        merger_named("ties", gamma=0.3)
    with pytest.raises(UpdateError, match="seed"):
        merger_named("dare")
    for name, bad in (("ties", 0.0), ("pcb", 1.1), ("breadcrumbs", 1.5)):
        with pytest.raises(UpdateError, match="density"):
            merger_named(name, density=bad)
    with pytest.raises(UpdateError, match="drop_rate"):
        merger_named("dare", seed=0, drop_rate=1.0)


def test_held_out_search_takes_the_best_and_ignores_broken_scores() -> None:
    stack = adapter_stack([{"a": np.ones(1, dtype=np.float32)}])
    candidates = [TaskArithmetic(lam) for lam in (0.2, 0.5, 1.0, 2.0)]
    chosen, merged = best_on_held_out(
        stack, candidates, lambda delta: math.nan if delta["a"][0] > 1.5 else -abs(float(delta["a"][0]) - 0.6)
    )
    assert chosen == TaskArithmetic(0.5)
    assert merged["a"].tolist() == [0.5]
    with pytest.raises(UpdateError, match="none of 4"):
        best_on_held_out(stack, candidates, lambda _: math.nan)
