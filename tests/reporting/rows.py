"""Rows of an invented run, for the tests of this room: plausible in shape, meaningless in value."""

from __future__ import annotations

import random
from collections.abc import Sequence

from fedpeft.ledger.records import Baseline, ClientOutcome, Evaluation, Finished, Round, Row, Score, Started

METRICS = ("exact-match", "loss", "perplexity")
CLIENTS = tuple(f"client-{index:02d}" for index in range(8))


def started(
    rounds: int = 12,
    clients: Sequence[str] = CLIENTS,
    *,
    baselines: bool = False,
    test_of_clients: bool = False,
) -> Started:
    return Started(
        run_name="demo",
        run_digest="ab" * 32,
        seed=7,
        rounds=rounds,
        engine="local",
        clients={client: 120 + 10 * index for index, client in enumerate(clients)},
        test_examples=400,
        test_of_clients=test_of_clients,
        baselines=baselines,
        trainable_parameters=65_536,
        total_parameters=865_536,
        base_digest="cd" * 32,
        cut_rows=3,
        primary_metric="exact-match",
        higher_is_better={"exact-match": True, "loss": False, "perplexity": False},
        versions={"fedpeft": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "peft": "0.21.2"},
    )


def evaluation(share: float, own: dict[str, float] | None = None) -> Evaluation:
    """An evaluation whose exact match is `share`; loss falls linearly with it."""
    loss = 2.4 - 2.0 * share
    half = 0.05 * (share * (1 - share) + 0.02) ** 0.5 * 2
    scores = {
        "exact-match": Score(value=share, low=max(0, share - half), high=min(1, share + half), count=400),
        "loss": Score(value=loss, low=loss - 0.08, high=loss + 0.08, count=400),
        "perplexity": Score(
            value=2.718**loss, low=2.718 ** (loss - 0.08), high=2.718 ** (loss + 0.08), count=400
        ),
    }
    clients = (
        {"exact-match": own, "loss": {key: 2.4 - 2 * value for key, value in own.items()}} if own else {}
    )
    return Evaluation(scores=scores, clients=clients)


def outcomes(rng: random.Random, clients: Sequence[str], loss: float) -> tuple[ClientOutcome, ...]:
    made = []
    for client in clients:
        luck = rng.random()
        if luck < 0.06:
            made.append(ClientOutcome(client=client, status="late", bytes_down=262_144, bytes_up=262_144))
        elif luck < 0.10:
            made.append(ClientOutcome(client=client, status="dropped", bytes_down=262_144))
        elif luck < 0.12:
            made.append(ClientOutcome(client=client, status="unavailable"))
        elif luck < 0.13:
            made.append(
                ClientOutcome(client=client, status="refused", reason="norm 91.2 is above 10", bytes_up=9)
            )
        else:
            made.append(
                ClientOutcome(
                    client=client,
                    status="folded",
                    examples=128,
                    steps=8,
                    loss=loss + rng.gauss(0, 0.05),
                    bytes_up=262_420,
                    bytes_down=262_420,
                    update_norm=1.2,
                )
            )
    return tuple(made)


def whole_run(rounds: int = 12, clients: Sequence[str] = CLIENTS, seed: int = 1) -> list[Row]:
    """A finished run with all baselines."""
    rng = random.Random(seed)
    skill = {client: rng.gauss(0, 0.06) for client in clients}

    def own(share: float) -> dict[str, float]:
        return {client: min(1.0, max(0.0, share + skill[client] * min(1, 6 * share))) for client in clients}

    rows: list[Row] = [
        started(rounds, clients),
        Round(round=0, evaluation=evaluation(0.004, own(0.004)), wall_s=1.5),
    ]
    for number in range(1, rounds + 1):
        share = 0.87 * (1 - 2.718 ** (-0.28 * number)) ** 1.8 + rng.gauss(0, 0.008)
        loss = 2.2 - 1.9 * share
        rows.append(
            Round(
                round=number,
                outcomes=outcomes(rng, clients, loss),
                train_loss=loss,
                state_norm_change=0.8 / number,
                evaluation=evaluation(share, own(share)),
                wall_s=5.0 + rng.random(),
            )
        )
    alone = {}
    for index, client in enumerate(clients):
        share = 0.16 + 0.014 * (index % 9)
        values = {client: min(1.0, 0.55 + 0.3 * rng.random())}
        alone[client] = evaluation(share, values)
    rows += [
        Baseline(name="zero-shot", evaluations={"zero-shot": evaluation(0.004)}, wall_s=1.4),
        Baseline(name="local", evaluations=alone, wall_s=31.0),
        Baseline(name="pooled", evaluations={"pooled": evaluation(0.951)}, wall_s=33.0),
        Finished(
            rounds=rounds,
            adapter_digest="ef" * 32,
            bytes_up_per_client=2_990_000.0,
            bytes_down_per_client=3_050_000.0,
            peak_rss_mib=612.0,
            wall_s=132.4,
        ),
    ]
    return rows
