"""The CUDA kernels: on a card where there is one, by Triton's interpreter where Triton is installed."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fedpeft.seedspace.accumulate import accumulate
from fedpeft.seedspace.digest import digest
from fedpeft.seedspace.layout import CounterStream, Purpose, Span
from fedpeft.seedspace.perturb import perturb, perturb_rows
from fedpeft.seedspace.project import project
from fedpeft.seedspace.space import SeedSpace

ROOT = Path(__file__).resolve().parents[2]

INTERPRETED = """
import torch
from fedpeft.seedspace import torch_kernels, triton_kernels
from fedpeft.seedspace.layout import CounterStream, Purpose, Span

stream, generator = CounterStream(2**63 + 12345, Purpose.MASK, 77), torch.Generator().manual_seed(0)
cpu, which = torch.device("cpu"), torch.arange(5) + 2**32 - 6
for size, start in ((1, 0), (200, 60), (4500, 129)):
    span = Span(2**32 - 2, start, start + size)
    for largest in (5, 2**40):
        amounts = torch.randint(-largest, largest, (5,), generator=generator)
        delta = torch.randint(-largest, largest, (size,), generator=generator)
        a, b = (m.accumulate(stream, span, which, amounts, cpu, 1) for m in (triton_kernels, torch_kernels))
        assert a.equal(b), ("accumulate", size, largest)
        a, b = (m.project(stream, span, which, delta, 1) for m in (triton_kernels, torch_kernels))
        assert a.equal(b), ("project", size, largest)
    for dtype in (torch.float32, torch.float64):
        weights = torch.randn(3, size, generator=generator).to(dtype)
        a, b = torch.empty_like(weights), torch.empty_like(weights)
        for module, out in ((triton_kernels, a), (torch_kernels, b)):
            module.perturb(stream, 1, 2**32 - 1, weights, torch.tensor([0, 1, 12345]), 1e-3, out)
        assert a.equal(b), ("perturb", size, dtype)
print("equal")
"""


@pytest.mark.slow
def test_interpreted_kernels_equal_the_plain_ones() -> None:
    if find_spec("triton") is None:
        pytest.skip("needs the package triton")
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "equal", done.stderr


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: none here")
    return torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_kernels_on_the_card_equal_the_cpu(cuda: torch.device, backend: str) -> None:
    generator = torch.Generator().manual_seed(1)
    stream, which = (
        CounterStream(2**40 + 1, Purpose.PERTURB, 5),
        torch.randperm(5000, generator=generator)[:300],
    )
    for size, start in ((1, 127), (129, 0), (100_001, 77)):
        span = Span(9, start, start + size)
        for largest in (100, 2**40):
            amounts = torch.randint(-largest, largest, (300,), generator=generator)
            delta = torch.randint(-largest, largest, (size,), generator=generator)
            on_card = accumulate(stream, span, which, amounts, device=cuda, backend=backend)
            assert on_card.cpu().equal(accumulate(stream, span, which, amounts))
            on_card = project(stream, span, which, delta.to(cuda), backend=backend)
            assert on_card.equal(project(stream, span, which, delta))
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            weights = torch.randn(size, generator=generator).to(dtype)
            here = perturb(stream, 9, 3, weights, 1e-3, start=start)
            there = perturb(stream, 9, 3, weights.to(cuda), 1e-3, start=start, backend=backend)
            assert there.cpu().equal(here)


@pytest.mark.gpu
def test_looked_up_rows_on_the_card(cuda: torch.device) -> None:
    table, rows = torch.randn(50, 300, generator=torch.Generator().manual_seed(2)), torch.tensor([3, 49, 3])
    here = perturb_rows(CounterStream(1), 0, 2, table, rows, 1e-2)
    assert perturb_rows(CounterStream(1), 0, 2, table.to(cuda), rows.to(cuda), 1e-2).cpu().equal(here)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_replay_on_the_card_reaches_the_cpu_digest(cuda: torch.device, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = {"w": (700, 900), "b": (901,)}
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    space = SeedSpace(CounterStream(5), 512, -16, shapes)
    amounts = torch.randint(-200, 200, (512,), generator=generator)
    here = {name: torch.empty_like(tensor) for name, tensor in base.items()}
    there = {name: tensor.to(cuda) for name, tensor in base.items()}
    space.replay(base, amounts, here)
    space.replay(there, amounts, there)
    assert digest(there) == digest(here)
