"""The first-order trainer against plain torch loops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft.config.sections import ModelSection, PeftSection, TrainingSection
from fedpeft.data.embedded import make_federated_rows
from fedpeft.data.encoded import Encoded, offsets_of
from fedpeft.errors import RunFileError, TrainingError
from fedpeft.models.attach import attach
from fedpeft.models.base_model import load_base, load_tokenizer
from fedpeft.models.trainable import get_arrays, trainable_parameters
from fedpeft.runtime.randomness import stream
from fedpeft.training.first_order import Rows, train
from fedpeft.training.lean import PAGED
from fedpeft.training.optimizers import OPTIMIZERS, SCHEDULES, build_optimizer, build_schedule, check_names
from fedpeft.training.steps import examples_per_round, local_steps


def encoded_rows(count: int) -> Rows:
    tokenizer = load_tokenizer(ModelSection())
    lines, starts = [], []
    for row in make_federated_rows(1, 2, count, 1)[0][:count]:  # tasks that the base model doesn't know
        prompt = tokenizer(row.prompt)["input_ids"]
        answer = tokenizer(row.answer, add_special_tokens=False)["input_ids"]
        lines.append(np.array([*prompt, *answer, tokenizer.eos_token_id], dtype=np.int32))
        starts.append(len(prompt))
    encoded = Encoded(
        np.concatenate(lines),
        offsets_of([len(line) for line in lines]),
        np.array(starts, dtype=np.int32),
        None,
        None,
    )
    return Rows(encoded, np.arange(count, dtype=np.int64), "causal-lm", int(tokenizer.pad_token_id or 0))


ROWS = encoded_rows(12)


def fresh(**peft: Any) -> torch.nn.Module:
    options = {"method": "lora", "r": 2, "init_lora_weights": "gaussian"} | peft
    return attach(load_base(ModelSection()), PeftSection.model_validate(options), task="causal-lm", seed=0)


def trained(
    section: TrainingSection, *, steps: int = 3, mu: float = 0.0, rows: Rows = ROWS, **peft: Any
) -> dict[str, Any]:
    model = fresh(**peft)
    report = train(
        model, trainable_parameters(model), rows, section, steps=steps, rng=stream(0, "test"), proximal_mu=mu
    )
    return {"arrays": get_arrays(model), "report": report}


def distance(one: dict[str, Any], two: dict[str, Any]) -> float:
    return max(float(np.abs(one["arrays"][name] - two["arrays"][name]).max()) for name in one["arrays"])


def test_one_step_equals_the_gradient_of_the_mean_token_loss() -> None:
    section = TrainingSection(optimizer="sgd", lr=0.1, batch_size=12)
    came = trained(section, steps=1)
    model = fresh()
    total, tokens = torch.zeros(()), 0
    for index in range(12):  # one row at a time, no padding
        line = torch.from_numpy(ROWS.encoded.row(index).astype(np.int64))
        start = int(ROWS.encoded.answer_start[index])
        logits = model(input_ids=line[None]).logits[0]
        total = total + torch.nn.functional.cross_entropy(
            logits[start - 1 : -1], line[start:], reduction="sum"
        )
        tokens += len(line) - start
    (total / tokens).backward()  # type: ignore[no-untyped-call]
    assert came["report"].loss == pytest.approx(float(total.detach()) / tokens, rel=1e-5)
    for name, parameter in trainable_parameters(model).items():
        assert parameter.grad is not None
        expected = (parameter.detach() - 0.1 * parameter.grad).numpy()
        np.testing.assert_allclose(came["arrays"][name], expected, atol=2e-6)


def test_accumulation_equals_the_large_batch() -> None:
    large = trained(TrainingSection(lr=1e-2, optimizer="sgd", batch_size=12), steps=2)
    small = trained(TrainingSection(lr=1e-2, optimizer="sgd", batch_size=4, gradient_accumulation=3), steps=2)
    assert small["report"].examples == large["report"].examples == 24
    assert distance(large, small) < 1e-6


def test_checkpointing_changes_memory_only() -> None:
    plain = trained(TrainingSection(lr=1e-2))
    assert distance(plain, trained(TrainingSection(lr=1e-2, gradient_checkpointing=True))) == 0.0


def test_proximal_term_pulls_to_the_start() -> None:
    """With plain SGD the second step is pulled back by lr * mu * (w1 - w0)."""
    section = TrainingSection(optimizer="sgd", lr=0.1, batch_size=12)
    start = {"arrays": get_arrays(fresh())}
    free_one, free_two = trained(section, steps=1), trained(section, steps=2)
    pulled = trained(section, steps=2, mu=0.5)
    assert distance(trained(section, steps=1, mu=0.5), free_one) == 0.0, (
        "at the start there is nothing to pull"
    )
    for name, array in pulled["arrays"].items():
        moved = free_one["arrays"][name] - start["arrays"][name]
        expected = free_two["arrays"][name] - 0.1 * 0.5 * moved
        np.testing.assert_allclose(array, expected, atol=1e-6)


def test_gradient_norm_is_clipped() -> None:
    bound = 1e-4
    section = TrainingSection(optimizer="sgd", lr=1.0, batch_size=12, max_grad_norm=bound)
    start, end = get_arrays(fresh()), trained(section, steps=1)["arrays"]
    moved = np.sqrt(sum(float(np.sum((end[name] - start[name]) ** 2)) for name in end))
    assert moved == pytest.approx(bound, rel=1e-2)


def test_bf16_is_near_fp32_and_parameters_stay_float32() -> None:
    exact, rounded = trained(TrainingSection(lr=1e-3)), trained(TrainingSection(lr=1e-3, precision="bf16"))
    assert all(array.dtype == np.float32 for array in rounded["arrays"].values())
    assert 0 < distance(exact, rounded) < 0.01
    assert rounded["report"].loss == pytest.approx(exact["report"].loss, rel=0.05)


def test_dropout_comes_from_the_stream_and_the_global_generator_stays() -> None:
    section = TrainingSection(lr=1e-2)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one = trained(section, lora_dropout=0.5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    two = trained(section, lora_dropout=0.5)
    assert distance(one, two) == 0.0
    assert distance(one, trained(section)) > 0, "dropout does something"


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - set(PAGED)))
def test_every_optimizer_lowers_the_loss(name: str) -> None:
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes", reason="needs the extra 'quant'")
    lr = {"sgd": 0.003, "adagrad": 0.01, "rmsprop": 5e-4}.get(name, 3e-3)
    section = TrainingSection(optimizer=name, lr=lr, batch_size=12)
    assert trained(section, steps=8)["report"].loss < trained(section, steps=1)["report"].loss


@contextmanager
def schedule_of(section: TrainingSection, steps: int) -> Iterator[list[float]]:
    optimizer = build_optimizer(section, [torch.nn.Parameter(torch.zeros(1))])
    schedule = build_schedule(section, optimizer, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    yield rates


def test_schedules() -> None:
    with schedule_of(TrainingSection(lr=1.0, schedule="linear"), 4) as rates:
        assert rates == pytest.approx([1.0, 0.75, 0.5, 0.25])
    with schedule_of(TrainingSection(lr=1.0, schedule="cosine"), 4) as rates:
        assert rates == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466])
    with schedule_of(TrainingSection(lr=1.0, warmup_steps=3), 6) as rates:
        assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    assert sorted(SCHEDULES) == ["constant", "cosine", "linear"]


def test_a_loss_that_is_not_finite_stops() -> None:
    with pytest.raises(TrainingError, match=r"at local step [2-9] of 9; lower training\.lr"):
        trained(TrainingSection(optimizer="sgd", lr=1e25), steps=9)


def test_names_are_checked() -> None:
    with pytest.raises(RunFileError) as caught:
        check_names(TrainingSection(optimizer="adamw", schedule="cosinus", momentum=0.9))
    assert len(caught.value.problems) == 2


def test_steps_of_a_round() -> None:
    section = TrainingSection(batch_size=8, epochs=1.5)
    assert local_steps(section, 20) == 4  # 30 rows in batches of 8
    assert local_steps(TrainingSection(steps=7), 20) == 7
    assert local_steps(TrainingSection(epochs=0.01), 5) == 1
    assert examples_per_round(TrainingSection(steps=2, batch_size=8, gradient_accumulation=2), 100) == 32
    assert examples_per_round(TrainingSection(steps=2, batch_size=8), 3) == 6
