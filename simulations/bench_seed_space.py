"""How fast and how small is the exact seed space, against the loop that the papers publish?

    python simulations/bench_seed_space.py --quick      # under 50 s on two cores; without --quick a few
    minutes

Peers are the published loop, written here: for each seed `torch.manual_seed`, `torch.randn` per tensor, and
an in-place axpy (replay) or a dot product (project). They are timed on a few seeds and scaled to K. The
strongest simple alternatives are NumPy's: signs as packed random bits, unpacked and added seed by seed
(`packed signs`), or 16 seeds at a time, whose bits of one weight are the index into a table of their 65,536
sums (`packed table`). They draw what no other machine can address by seed and place. Ratios to them, and
`..._1_thread`, are of processor time on one thread; the others are of wall time on two, ours and the
published loop's turns alternating, and mean little on a busy machine. The last line is one JSON object:
`replay_speedup` (expected 60 or more over the published loop), `project_speedup` (40 or more),
`replay_speedup_vs_packed_signs`, `replay_speedup_vs_packed_table` and `project_speedup_vs_packed_table` (1 or
more), `step_vs_two_forwards` (1.15 or less; the larger of two measures is `step_vs_two_forwards_worst`),
`step_memory_vs_inference` (1.2 or less), `uplink_bytes` (1024 or less), `downlink_bytes` (8192 or less),
`digests_equal` (true), and the times behind them.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from fedpeft.seedspace.digest import digest
from fedpeft.seedspace.jit_perturb import JustInTime
from fedpeft.seedspace.layout import CounterStream, tensor_ids
from fedpeft.seedspace.perturb import perturb
from fedpeft.seedspace.space import SeedSpace
from fedpeft.seedspace.trainable_tensors import trainable_parameters, trainable_shapes
from fedpeft.wire.codec import Envelope, decode, encode
from fedpeft.wire.state_message import StateMessage, encode_state

NUM_SEEDS, LOCAL_STEPS, CLIENTS = 4096, 200, 10
TOKENS, SCALE = 128, 1e-3
EXPONENT = -24  # the quantum of the replayed amounts
STORIES = Path(__file__).resolve().parents[2] / "shared" / "models" / "stories260K"

Model: TypeAlias = Any  # transformers comes without types


def main() -> None:
    """Measures everything and prints one JSON object as the last line."""
    transformers.utils.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description="benchmark of the exact seed space")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, under 50 s")
    parser.add_argument("--memory", choices=["forward", "step"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(peak_memory(arguments.memory))
        return
    turns = 2 if arguments.quick else 9
    began = time.perf_counter()
    result: dict[str, object] = {}
    model = llama_15m()
    parts: tuple[Callable[[], dict[str, object]], ...] = (
        lambda: replay_and_project(model, turns),
        lambda: step_time(model, 4 * turns),
        step_memory,
        lambda: wire_bytes(1 if arguments.quick else CLIENTS),
        digests,
        on_a_card,
    )
    for part in parts:
        result |= part()
        print(f"{time.perf_counter() - began:6.1f} s  {json.dumps(result)}", file=sys.stderr)
    print(json.dumps(result))


def llama_15m() -> Model:
    """A Llama of 15.2M parameters, tied embedding, random weights: times don't depend on them."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=288,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        tie_word_embeddings=True,
    )
    model: Model = transformers.LlamaForCausalLM(config)
    return model.eval()


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def processor_seconds(work: Callable[[], object]) -> float:
    """Processor time of one call on one thread: other work on the machine doesn't count."""
    began = time.process_time()
    work()
    return time.process_time() - began


def replay_and_project(model: Model, turns: int) -> dict[str, object]:
    """K = 4096 scalars replayed over all weights, and projections onto K directions, against the peers."""
    shapes = trainable_shapes(model)
    space = SeedSpace(CounterStream(1), NUM_SEEDS, EXPONENT, shapes)
    base = {name: parameter.detach() for name, parameter in trainable_parameters(model).items()}
    into = {name: torch.empty_like(tensor) for name, tensor in base.items()}
    rng = np.random.default_rng(0)
    amounts = torch.from_numpy(np.rint(rng.normal(0, 60, NUM_SEEDS)).astype(np.int64))
    delta = {name: (tensor * 2.0**16).round().clamp(-(2**14), 2**14).long() for name, tensor in base.items()}
    directions = torch.arange(256)
    small = torch.zeros_like(amounts)
    small[:3] = 1
    space.replay(base, small, into)  # compiles
    space.project(delta, directions[:1])

    torch.set_num_threads(2)
    peer_replay, peer_project, replays, projections = [], [], [], []
    for _ in range(turns):
        peer_replay.append(seconds(lambda: replay_published_axpy(into, seed=3)))
        replays.append(seconds(lambda: space.replay(base, amounts, into, threads=2)))
        peer_replay.append(seconds(lambda: replay_published_axpy(into, seed=4)))
        peer_project.append(seconds(lambda: compute_published_dot(base, seed=5)))
        projections.append(seconds(lambda: space.project(delta, directions, threads=2)) / len(directions))
    torch.set_num_threads(1)
    one_thread = processor_seconds(lambda: space.replay(base, amounts, into, threads=1))
    peer_one_thread = min(processor_seconds(lambda: replay_published_axpy(into, seed=6)) for _ in range(2))
    peer_project_one_thread = min(
        processor_seconds(lambda: compute_published_dot(base, seed=7)) for _ in range(2)
    )
    torch.set_num_threads(2)
    visited = torch.where(torch.arange(NUM_SEEDS) < LOCAL_STEPS, amounts, 0)
    catch_up = seconds(lambda: space.replay(base, visited, into, threads=2))
    one_thread_project = processor_seconds(lambda: space.project(delta, directions, threads=1))
    one_thread_project /= len(directions)
    flat = torch.cat([part.flatten() for part in delta.values()]).numpy()
    packed = {
        "signs": min(numpy_replay_signs(flat.size, amounts.numpy()[:8]) for _ in range(2)) / 8,
        "table": min(numpy_replay_table(flat.size, amounts.numpy()[:32]) for _ in range(2)) / 32,
        "project": min(numpy_project_table(flat, 32) for _ in range(2)) / 32,
    }
    peer, ours = float(np.median(peer_replay)), float(np.median(replays))
    return {
        "replay_speedup_1_thread": round(peer_one_thread * NUM_SEEDS / one_thread, 1),
        "project_speedup_1_thread": round(peer_project_one_thread / one_thread_project, 1),
        "replay_speedup_vs_packed_signs": round(packed["signs"] * NUM_SEEDS / one_thread, 2),
        "replay_speedup_vs_packed_table": round(packed["table"] * NUM_SEEDS / one_thread, 2),
        "project_speedup_vs_packed_table": round(packed["project"] / one_thread_project, 2),
        "packed_ms_per_seed_1_thread": {name: round(1e3 * value, 3) for name, value in packed.items()},
        "replay_speedup": round(peer * NUM_SEEDS / ours, 1),
        "project_speedup": round(float(np.median(peer_project) / np.median(projections)), 1),
        "replay_s": round(ours, 3),
        "peer_replay_s": f"{peer * NUM_SEEDS:.0f} (scaled from {len(peer_replay)} seeds)",
        "replay_ms_per_seed_1_thread": round(1e3 * one_thread / NUM_SEEDS, 3),
        "replay_ms_per_seed_2_threads": round(1e3 * ours / NUM_SEEDS, 3),
        "project_ms_per_seed_2_threads": round(1e3 * float(np.median(projections)), 3),
        "replay_200_visited_s": round(catch_up, 3),
        "dimension": space.dimension,
    }


def replay_published_axpy(weights: dict[str, torch.Tensor], seed: int) -> None:
    """One seed of the published replay."""
    torch.manual_seed(seed)
    for weight in weights.values():
        weight.add_(torch.randn(weight.shape), alpha=1e-6)


def compute_published_dot(delta: dict[str, torch.Tensor], seed: int) -> float:
    """One seed of the published projection."""
    torch.manual_seed(seed)
    return sum(float((part * torch.randn(part.shape)).sum()) for part in delta.values())


CHUNK = 2**18  # weights whose sums NumPy holds at a time
TOGETHER = 16  # seeds whose bits of one weight are one index


def numpy_replay_signs(size: int, amounts: NDArray[np.int64]) -> float:
    """Processor seconds to add amounts times packed random signs to `size` sums, seed by seed."""
    rng = np.random.Generator(np.random.SFC64(0))
    began = time.process_time()
    sums = np.full(size, -int(amounts.sum()), dtype=np.int32)
    for start in range(0, size, CHUNK):
        part = sums[start : start + CHUNK]
        for amount in amounts.tolist():
            bits = np.unpackbits(np.frombuffer(rng.bytes(CHUNK // 8), dtype=np.uint8))[: part.size]
            part += np.multiply(bits, 2 * amount, dtype=np.int32)
    return time.process_time() - began


def numpy_replay_table(size: int, amounts: NDArray[np.int64]) -> float:
    """The same, with one look-up for `TOGETHER` seeds."""
    rng = np.random.Generator(np.random.SFC64(0))
    began = time.process_time()
    tables = []
    for first in range(0, len(amounts), TOGETHER):
        table = np.zeros(1, dtype=np.int32)
        for amount in amounts[first : first + TOGETHER].tolist():
            table = np.concatenate([table - np.int32(amount), table + np.int32(amount)])
        tables.append(table)
    sums, found = np.zeros(size, dtype=np.int32), np.empty(CHUNK, dtype=np.int32)
    for start in range(0, size, CHUNK):
        part = sums[start : start + CHUNK]
        for table in tables:
            index = np.frombuffer(rng.bytes(2 * CHUNK), dtype=np.uint16)[: part.size]
            part += table.take(index, out=found[: part.size], mode="clip")
    return time.process_time() - began


def numpy_project_table(delta: NDArray[np.int64], count: int) -> float:
    """Processor seconds of projections on packed directions, `count` of them; entries are binned first."""
    rng = np.random.Generator(np.random.SFC64(0))
    signs = 2.0 * ((np.arange(2**TOGETHER)[:, None] >> np.arange(TOGETHER)) & 1) - 1.0
    began = time.process_time()
    for _ in range(0, count, TOGETHER):
        sums = np.zeros(2**TOGETHER)
        for start in range(0, delta.size, CHUNK):
            part = delta[start : start + CHUNK]
            index = np.frombuffer(rng.bytes(2 * CHUNK), dtype=np.uint16)[: part.size]
            sums += np.bincount(index, weights=part, minlength=2**TOGETHER)
        _ = sums @ signs
    return time.process_time() - began


def loss_of(model: Model, tokens: torch.Tensor) -> float:
    """Cross-entropy of the next token, in float32."""
    logits = model(input_ids=tokens, use_cache=False).logits
    return float(torch.nn.functional.cross_entropy(logits[0, :-1].float(), tokens[0, 1:]))


def two_sided(jit: JustInTime, model: Model, tokens: torch.Tensor, direction: int) -> float:
    """(loss(theta + scale z) - loss(theta - scale z)) / (2 scale)."""
    with jit.at(direction, SCALE):
        above = loss_of(model, tokens)
    with jit.at(direction, -SCALE):
        below = loss_of(model, tokens)
    return (above - below) / (2 * SCALE)


def step_time(model: Model, turns: int) -> dict[str, object]:
    """A two-sided evaluation against two plain forward passes, batch 1, 128 tokens.

    On one thread, in processor time: the two take turns, and the median is of the ratios of neighbours.
    """
    torch.set_num_threads(1)
    tokens = torch.randint(0, 32000, (1, TOKENS))
    jit = JustInTime(model, tensor_ids(trainable_shapes(model)), CounterStream(2))
    plain, steps = [], []
    with torch.no_grad():
        two_sided(jit, model, tokens, 0)
        for turn in range(turns):
            began = time.process_time()
            loss_of(model, tokens), loss_of(model, tokens)
            between = time.process_time()
            two_sided(jit, model, tokens, turn)
            plain.append(between - began)
            steps.append(time.process_time() - between)
    median, minima = float(np.median(np.array(steps) / np.array(plain))), min(steps) / min(plain)
    return {
        "step_vs_two_forwards": round(median, 3),
        "step_vs_two_forwards_of_minima": round(minima, 3),
        "step_vs_two_forwards_worst": round(max(median, minima), 3),
        "two_forwards_s": round(float(np.median(plain)), 4),
    }


def step_memory() -> dict[str, object]:
    """Peak anonymous memory above the loaded model, each kind of pass in a process of its own."""
    peaks = {}
    for kind in ("forward", "step"):
        command = [sys.executable, __file__, "--memory", kind]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[kind] = int(done.stdout)
    return {
        "step_memory_vs_inference": round(peaks["step"] / peaks["forward"], 3),
        "inference_peak_mb": round(peaks["forward"] / 2**20, 1),
    }


def peak_memory(kind: str) -> int:
    """Bytes of RssAnon that a few passes need beyond the loaded model, sampled."""
    torch.set_num_threads(1)
    model = llama_15m()
    tokens = torch.randint(0, 32000, (1, TOKENS))
    perturb(CounterStream(0), 0, 0, torch.zeros(300), SCALE)  # compiles
    jit = JustInTime(model, tensor_ids(trainable_shapes(model)), CounterStream(2))
    loss_of(model, tokens[:, :2])  # threads and library buffers of first use
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(2e-4)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with torch.no_grad():
        for turn in range(6):
            if kind == "forward":
                loss_of(model, tokens)
            else:
                two_sided(jit, model, tokens, turn)
    done.set()
    watcher.join()
    return peak - before


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("no RssAnon in /proc/self/status: this measurement needs Linux")


def wire_bytes(clients: int) -> dict[str, object]:
    """Serialised messages of tau = 200 zeroth-order steps on a small language model, up and down.

    Down goes what the round changed; `whole_state_bytes` is what a late joiner gets, all seeds visited.
    `clients` of the ten really train; the others' scalars are theirs, reordered over seeds of their own.
    """
    rng = np.random.default_rng(1)
    trained = [local_amounts(client) for client in range(clients)]
    uploads = list(trained)
    for client in range(clients, CLIENTS):
        scalars = trained[client % clients]
        other = np.zeros_like(scalars)
        visited = rng.choice(NUM_SEEDS, size=np.count_nonzero(scalars), replace=False)
        other[visited] = rng.permutation(scalars[scalars != 0])
        uploads.append(other)
    payloads = [message(upload, f"client-{number:02d}") for number, upload in enumerate(uploads)]
    change = message(np.rint(np.mean(uploads, axis=0)).astype(np.int64), "")
    down = encode_state(StateMessage("cd" * 32, steps=(change,), keep=True))
    for payload, upload in zip(payloads, uploads, strict=True):
        if not np.array_equal(decode(payload, who="a client").arrays["amounts"], upload):
            raise SystemExit("decoded scalars differ from those sent")
    return {
        "uplink_bytes": max(map(len, payloads)),
        "downlink_bytes": len(down),
        "whole_state_bytes": len(message(np.rint(rng.normal(0, 40, NUM_SEEDS)).astype(np.int64), "")),
        "scalar_bits": round(float(np.log2(np.abs(uploads[0]).max())) + 1, 1),
        "clients_trained": clients,
        "wire_model": "stories260K" if STORIES.is_dir() else "random Llama",
    }


def message(amounts: NDArray[np.int64], client: str) -> bytes:
    """An update (or, without a client, a step of the state) as it travels, digests and all."""
    metrics = {"loss": 2.5, "steps": 200.0, "examples": 200.0} if client else {}
    state = {} if client else {"fingerprint": np.full(8, 2**31, dtype=np.int64)}
    return encode(
        Envelope(
            {"amounts": amounts, **state},
            "ab" * 32,
            7,
            "cd" * 32,
            "seed-scalars",
            client,
            weight=200 if client else 0,
            metrics=metrics,
            base_digest="ef" * 32 if client else "",
        )
    )


def local_amounts(client: int) -> NDArray[np.int64]:
    """The integers that one client uploads after 200 steps; a typical scalar has the size 40."""
    torch.set_num_threads(1)
    model = language_model()
    parameters = trainable_parameters(model)
    ids, stream = tensor_ids(trainable_shapes(model)), CounterStream(7)
    jit, rng = JustInTime(model, ids, stream), np.random.default_rng(100 + client)
    amounts = np.zeros(NUM_SEEDS, dtype=np.int64)
    learning_rate, typical = 1e-5, 8.0
    quantum = 2.0 ** round(np.log2(learning_rate * typical / 40))
    with torch.no_grad():
        for _ in range(LOCAL_STEPS):
            direction = int(rng.integers(NUM_SEEDS))
            tokens = torch.from_numpy(rng.integers(3, 500, size=(1, 32)))
            scalar = two_sided(jit, model, tokens, direction)
            amount = -round(learning_rate * scalar / quantum)
            for name, weight in parameters.items():
                perturb(stream, ids[name], direction, weight, amount * quantum, out=weight)
            amounts[direction] += amount
    return amounts


def language_model() -> Model:
    """stories260K where the shared folder has it, else a Llama of that shape with random weights."""
    if STORIES.is_dir():
        return transformers.AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    model: Model = transformers.LlamaForCausalLM(config)
    return model.eval()


def digests() -> dict[str, object]:
    """One replay by every backend and thread count of this machine, in three types, must reach one digest."""
    shapes = {"a": (301, 77), "b": (129,), "c": (1,), "d": (64, 256)}
    space = SeedSpace(CounterStream(2**40 + 9), 300, -20, shapes)
    generator = torch.Generator().manual_seed(3)
    amounts = torch.randint(-99, 99, (300,), generator=generator)
    ways = [("cpu", "numba", 1), ("cpu", "numba", 2), ("cpu", "torch", 1)]
    ways += [("cuda", "triton", 1), ("cuda", "torch", 1)] if torch.cuda.is_available() else []
    equal = True
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        found = set()
        for device, backend, threads in ways:
            there = {name: tensor.to(device, copy=True) for name, tensor in base.items()}
            space.replay(there, amounts, there, backend=backend, threads=threads)
            found.add(digest(there))
        equal &= len(found) == 1
    return {"digests_equal": equal, "digest_ways": [f"{d}/{b}/{t}" for d, b, t in ways]}


def on_a_card() -> dict[str, object]:
    """K = 4096 over 1B parameters in bfloat16 against the published loop, on one card if there is one."""
    if not torch.cuda.is_available():
        return {"gpu": "no CUDA device: not measured"}
    size = 10**9
    base = {"w": torch.randn(size, device="cuda", dtype=torch.bfloat16)}
    space = SeedSpace(CounterStream(1), NUM_SEEDS, EXPONENT, {"w": (size,)})
    amounts = torch.from_numpy(np.rint(np.random.default_rng(0).normal(0, 60, NUM_SEEDS)).astype(np.int64))

    def timed(work: Callable[[], object]) -> float:
        torch.cuda.synchronize()

        def finished() -> None:
            work()
            torch.cuda.synchronize()

        return seconds(finished)

    def published() -> None:
        torch.manual_seed(5)
        base["w"].add_(torch.randn(size, device="cuda", dtype=torch.bfloat16), alpha=1e-6)

    few = torch.where(torch.arange(NUM_SEEDS) < 2, 1, 0)
    timed(lambda: space.replay(base, few, base))  # compiles
    published()
    peer = float(np.median([timed(published) for _ in range(5)])) * NUM_SEEDS
    ours = timed(lambda: space.replay(base, amounts, base))
    return {
        "gpu": torch.cuda.get_device_name(),
        "gpu_replay_1b_s": round(ours, 2),
        "gpu_replay_speedup": round(peer / ours, 1),
    }


if __name__ == "__main__":
    main()
