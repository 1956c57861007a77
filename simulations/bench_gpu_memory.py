"""What a client's training takes of a GPU, by size of the base, its precision and the way it is trained.

Question: do clients with one consumer GPU train bases of 1 to 7 billion parameters, and in how much memory?
Command:  python simulations/bench_gpu_memory.py [--shapes 1b 3b 7b]
Expected: NF4 with LoRA r = 16 at batch 16 and 512 tokens at or below what FlowerTune LLM reports for the same
          shapes: 10.6 GB at 3B and 16.5 GB at 7B; zeroth order at most 1.2 times inference; plans within 15%.
Run time: minutes per shape, most of them for writing and quantising random weights. Needs a CUDA device, and
          for 7B 14 GB of disk and 30 GB of main memory; without a device it says so and measures nothing.

Shapes are those of TinyLlama 1.1B and of OpenLLaMA 3B and 7B, weights are random and the file is bfloat16.
LoRA is on queries and values, gradient checkpointing is on, products are bfloat16. Memory is the most that
torch's tensors took on the device, in a process of its own for each cell; speed is that of a second round.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

GB = 10**9
STEPS = 4
PEER_GB = {"3b": 10.6, "7b": 16.5}


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama, and the batch that it trains on."""

    hidden: int
    inner: int
    layers: int
    heads: int
    keys: int
    vocabulary: int = 32_000
    rows: int = 16
    tokens: int = 512


SHAPES = {
    "1b": Shape(2048, 5632, 22, 32, 4),
    "3b": Shape(3200, 8640, 26, 32, 32),
    "7b": Shape(4096, 11008, 32, 32, 32),
    "tiny": Shape(64, 128, 2, 4, 4, vocabulary=256, rows=4, tokens=32),  # to try the script
}
LORA = {"method": "lora", "r": 16, "target_modules": ["q_proj", "v_proj"]}
FIRST = {"kind": "first-order", "optimizer": "adamw", "lr": 1e-4, "precision": "bf16"}
FIRST |= {"gradient_checkpointing": True}
ZEROTH = {"kind": "zeroth-order", "radius": 1e-3, "lr": 1e-3}
SEEDS = {"kind": "seed-scalars", "num_seeds": 64}

# Trainer and base: what of its run file differs.
CELLS: dict[tuple[str, str], dict[str, Any]] = {
    ("lora", "nf4"): {"peft": LORA, "training": FIRST},
    ("lora", "int8"): {"peft": LORA, "training": FIRST},
    ("lora", "bf16"): {"peft": LORA, "training": FIRST},
    ("peqa", "rtn4"): {"peft": {"method": "peqa"}, "training": FIRST},
    ("inference", "nf4"): {"peft": LORA, "training": {"kind": "none"}},
    ("zeroth order", "nf4"): {"peft": LORA, "training": ZEROTH, "space": SEEDS},
}
BASES: dict[str, dict[str, Any]] = {
    "nf4": {"quantization": "nf4", "compute_dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
    "bf16": {},
    "rtn4": {"quantization": "rtn4", "group_size": 64, "compute_dtype": "bfloat16"},
}


def write_llama(folder: Path, shape: Shape) -> int:
    """Save a random Llama with a tokenizer of words, and rows of full length; its number of parameters."""
    import numpy as np
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.keys,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    torch.manual_seed(0)
    for parameter in model.parameters():
        bound = 1 / math.sqrt(parameter.shape[-1])
        parameter.data.uniform_(-bound, bound) if parameter.dim() > 1 else parameter.data.fill_(1.0)
    model.save_pretrained(folder)
    words = {"<unk>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, shape.vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(
        folder
    )
    rng = np.random.default_rng(0)
    texts = (
        " ".join(f"w{i}" for i in rng.integers(2, shape.vocabulary, shape.tokens)) for _ in range(shape.rows)
    )
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return sum(parameter.numel() for parameter in model.parameters())


def tables(folder: str, shape: Shape, trainer: str, base: str, device: str) -> dict[str, Any]:
    """A run file of one client."""
    parts = CELLS[trainer, base]
    data = {
        "train": f"{folder}/rows.jsonl",
        "text": "{text}",
        "max_length": shape.tokens,
        "heldout": 0.0,
        "partitioner": {"kind": "iid", "clients": 1},
    }
    if trainer == "inference":
        data |= {"test": data["train"]}
    return {
        "run": {"name": "bench-gpu-memory", "rounds": 2},
        "model": {"path": folder, "dtype": "bfloat16", "device": device} | BASES[base],
        "peft": parts["peft"],
        "data": data,
        "training": {"steps": STEPS, "batch_size": shape.rows} | parts["training"],
        "space": parts.get("space", {"kind": "adapter-delta"}),
        "evaluation": {"batch_size": shape.rows},
    }


def work(folder: str, name: str, trainer: str, base: str, device: str) -> dict[str, Any]:
    """Load the run and hold two rounds of its one client, or score as many batches; what that took."""
    import numpy as np

    from fedpeft.config.run_file import build_run
    from fedpeft.models.device import peak_memory
    from fedpeft.participant.load_simulation import load_simulated_run
    from fedpeft.planning.memory import estimate_memory, on_gpu

    shape = SHAPES[name]
    resident = load_simulated_run(build_run(tables(folder, shape, trainer, base, device), source="bench"))
    state = resident.space.initial_state(resident.parameters)
    seconds = 0.0
    for round_ in (1, 2):
        began = time.perf_counter()
        if trainer == "inference":
            batches = [np.arange(shape.rows)] * (2 * STEPS)
            resident.score(resident.data.test, batches, state, ("loss",))
        else:
            resident.train_client(0, round_, state, proximal_mu=0.0)
        seconds = time.perf_counter() - began
    passes = 2 * STEPS if trainer == "inference" else STEPS
    planned = on_gpu(estimate_memory(resident.run, resident.model, resident.data, ()), resident.run).peak
    tokens = passes * shape.rows * shape.tokens
    return {"peak": peak_memory(resident.device), "planned": planned, "tokens_per_s": tokens / seconds}


def measure_cell(folder: str, name: str, trainer: str, base: str, device: str) -> dict[str, Any]:
    """A cell's figures, from a process of its own."""
    root = Path(__file__).resolve().parents[1]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, __file__, "--cell", json.dumps([folder, name, trainer, base, device])],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        check=False,
    )
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def line(trainer: str, base: str, row: dict[str, Any]) -> str:
    """A cell for people."""
    if "failed" in row:
        return f"{trainer:14}{base:6} failed: {row['failed'][0]}"
    peak = "-" if row["peak"] is None else f"{row['peak'] / GB:.2f}"
    return f"{trainer:14}{base:6}{peak:>9}{row['planned'] / GB:9.2f}{row['tokens_per_s']:11.0f}"


def measure_shape(name: str, device: str) -> dict[str, dict[str, Any]]:
    """Write the shape's random base, and measure and print all of its cells."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        count = write_llama(Path(folder), SHAPES[name])
        peer = f"; FlowerTune LLM reports {PEER_GB[name]} GB with NF4" if name in PEER_GB else ""
        print(f"\n{name}: {count / 1e9:.2f} billion parameters{peer}")
        print(f"{'trainer':14}{'base':6}{'peak GB':>9}{'plan GB':>9}{'tokens/s':>11}")
        for trainer, base in CELLS:
            found[f"{trainer}/{base}"] = row = measure_cell(folder, name, trainer, base, device)
            print(line(trainer, base, row), flush=True)
    return found


def main() -> None:
    """Measure the shapes, or one cell for the process that asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["1b", "3b", "7b"])
    parser.add_argument("--device", default="cuda", help="cpu: to try the script; peaks are a GPU's alone")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.cell:
        print(json.dumps(work(*json.loads(asked.cell))))
        return
    import torch

    if asked.device != "cpu" and not torch.cuda.is_available():
        print("this needs a CUDA device and there is none: nothing was measured")
        return
    found = {name: measure_shape(name, asked.device) for name in asked.shapes}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
