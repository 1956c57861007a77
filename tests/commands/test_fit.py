"""`fedpeft plan --fit` and the check before a load, against models that are really loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedpeft.commands.plan import bytes_of
from fedpeft.config.run_file import build_run
from fedpeft.config.sections import ModelSection, PeftSection
from fedpeft.data.embedded import model_folder
from fedpeft.errors import ModelError, UsageError
from fedpeft.models.attach import attach
from fedpeft.models.base_model import load_base, load_tokenizer
from fedpeft.models.device import available_memory
from fedpeft.models.methods import base_refusal, method_named
from fedpeft.models.offsite import whole_model
from fedpeft.models.sketch import sketch, weights_of
from fedpeft.planning.fit import propose
from fedpeft.planning.loading import read_rows
from fedpeft.planning.memory_admission import refuse_oversized
from fedpeft.planning.predict import Predictor
from tests.commands.calling import TINY, Call, overrides

MIB = 2**20
TABLES: dict[str, Any] = {
    "run": {"name": "fit", "rounds": 1},
    "peft": {"method": "lora", "r": 16, "target_modules": "all-linear"},
    "data": {"limit": 64, "partitioner": {"kind": "iid", "clients": 2}},
    "training": {"batch_size": 16, "lr": 1e-3},
    "evaluation": {"metrics": ["loss"], "batch_size": 1},
}


@pytest.mark.parametrize("method", ["lora", "ffa-lora", "vera", "full", "peqa"])
@pytest.mark.parametrize("kind", ["none", "int8", "nf4", "rtn4"])
def test_a_sketch_weighs_what_the_model_does(kind: str, method: str) -> None:
    if base_refusal(method_named(method), kind) is not None:
        return
    if kind in ("int8", "nf4"):
        pytest.importorskip("bitsandbytes", reason="needs the extra 'quant'")
    section, peft = ModelSection.model_validate({"quantization": kind}), PeftSection(method=method)
    loaded = attach(load_base(section), peft, task="causal-lm", seed=0)
    assert sketch(section, peft).weights == weights_of(loaded)


def test_a_sketch_has_the_run_files_dtype_and_not_the_files(tmp_path: Path) -> None:
    whole: Any = whole_model(str(model_folder()), "causal-lm")
    whole.bfloat16().save_pretrained(tmp_path)
    load_tokenizer(ModelSection()).save_pretrained(tmp_path)
    section, peft = ModelSection(path=str(tmp_path)), PeftSection(method="full")
    loaded = attach(load_base(section), peft, task="causal-lm", seed=0)
    assert sketch(section, peft).weights == weights_of(loaded)


def test_proposals_go_as_far_as_they_must_and_fit() -> None:
    run = build_run(TABLES, source="test")
    data = read_rows(run)
    whole = Predictor(data).memory(run).peak
    as_it_is = propose(run, data, whole, libraries=0)
    assert [(p.tier, p.settings, p.fits) for p in as_it_is] == [("as it is", (), True)]
    settings: list[tuple[str, ...]] = []
    for share in (0.6, 0.3):
        found = propose(run, data, int(share * whole), libraries=0)
        assert [p.fits for p in found] == [False] * (len(found) - 1) + [True]
        changed = build_run(run.model_dump(mode="json"), found[-1].settings, source="test")
        assert Predictor(data).memory(changed).peak == found[-1].total <= share * whole
        settings.append(found[-1].settings)
        rows = changed.training.batch_size * changed.training.gradient_accumulation
        assert rows == run.training.batch_size
    assert settings[0] != settings[1]
    nothing = propose(run, data, MIB // 100, libraries=0)
    assert not nothing[-1].fits
    assert nothing[-1].total < whole


def test_a_run_that_is_too_large_is_refused_before_the_load(tmp_path: Path) -> None:
    run = build_run(TABLES, source="test")
    data = read_rows(run)
    whole = Predictor(data).memory(run).peak
    refuse_oversized(run, data, limit=whole)
    with pytest.raises(ModelError, match=r"and \d+ MiB are left; what would fit, in \d+ MiB: --set '"):
        refuse_oversized(run, data, limit=int(0.6 * whole))
    with pytest.raises(ModelError, match="with --workers 1 it takes"):
        refuse_oversized(run, data, limit=whole, workers=2)
    with pytest.raises(ModelError, match="no settings fit"):
        refuse_oversized(run, data, limit=1000)
    assert available_memory() > 0


def test_fit_for_people_and_for_machines(call: Call) -> None:
    code, out, _ = call("plan", "--fit", "8GB", *overrides(*TINY))
    assert code == 0
    assert "the run file fits as it is" in out
    code, out, _ = call("plan", "--fit", "1MB", "--json", *overrides(*TINY))
    assert code == 3
    found = json.loads(out)
    assert found["limit"] == 10**6
    assert found["proposals"][0]["tier"] == "as it is"
    assert not any(proposal["fits"] for proposal in found["proposals"])
    assert found["proposals"][0]["memory"]["peak"] + found["libraries"] == found["proposals"][0]["total"]


def test_sizes() -> None:
    assert bytes_of("8GB") == 8 * 10**9
    assert bytes_of("1.5 GiB") == 1536 * MIB
    for wrong in ("8", "GB", "-1GB", "8 gigs", "nanGB"):
        with pytest.raises(UsageError, match="needs a size with a unit"):
            bytes_of(wrong)
