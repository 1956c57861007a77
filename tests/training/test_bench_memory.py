"""The memory benchmark's quick form: it ends with its promised figures, and they meet their targets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("bitsandbytes", reason="needs the extra 'quant'")
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is read from Linux's /proc")
def test_quantised_bases_take_what_is_promised_and_planned() -> None:
    command = [sys.executable, str(REPOSITORY / "simulations" / "bench_memory.py"), "--quick"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0.5 < found["nf4_bytes_per_param"] < 0.6
    assert 0.8 < found["zo_memory_vs_inference"] < 1.2
    assert found["plan_error_max"] < 0.15
    assert found["load_peak_vs_full_precision"] < 0.5
