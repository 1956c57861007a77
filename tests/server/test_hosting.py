"""What a daemon lets a run's agents send."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedpeft.config.run_file import build_run
from fedpeft.participant.load_server import load_serving_run
from fedpeft.stages import StageContext, on_client, stage_list
from fedpeft.updates.update import Update, layout_of
from fedpeft.wire.codec import Envelope, encode
from fedpeft_server.runs.hosting import largest_update

STAGES: dict[str, list[dict[str, Any]]] = {
    "plain": [],
    "half of the entries": [{"kind": "top-k", "density": 0.5}],
    "all entries, as positions": [{"kind": "top-k", "density": 1.0}],
}


@pytest.mark.parametrize("name", sorted(STAGES))
def test_no_sound_update_is_beyond_the_bound(name: str) -> None:
    run = build_run(
        {
            "run": {"name": "bound", "rounds": 1},
            "peft": {"method": "lora", "r": 16, "target_modules": "all-linear"},
            "data": {
                "train": "nowhere.jsonl",
                "prompt": "{q}",
                "answer": "{a}",
                "partitioner": {"kind": "files", "clients": 2},
            },
            "stages": STAGES[name],
        },
        source="test",
    )
    resident = load_serving_run(run)
    layout = resident.space.update_layout(layout_of(resident.space.initial_state(resident.parameters)))
    rng = np.random.default_rng(0)
    arrays = {key: rng.normal(size=shape).astype(kind) for key, (shape, kind) in layout.items()}
    update = on_client(resident.stages, Update(arrays, 3, {"train_loss": 1.0}), StageContext(0, 1, "a"))
    sent = encode(
        Envelope(
            arrays=update.arrays,
            run_digest=resident.run_digest,
            round=1,
            state_digest="ab" * 32,
            space=resident.space.kind,
            client="a",
            weight=update.weight,
            metrics=update.metrics,
            encoded=update.encoded,
            base_digest=resident.base_digest,
            stages=stage_list(resident.stages),
        )
    )
    bound = largest_update(resident)
    assert len(sent) < bound
    plain = sum(4 * int(np.prod(shape)) for shape, _ in layout.values())
    assert bound < 2 * plain + (1 << 20) + 1, "and not by much"
