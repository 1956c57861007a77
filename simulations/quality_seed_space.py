"""Does training by seed-scalars work, and are signs as good as normals? Full-parameter, Shakespeare by role.

    python simulations/quality_seed_space.py --out runs/seed-space           (8 minutes, one core)
    python simulations/quality_seed_space.py --out runs/seed-space --quick   (1 minute: one seed, two rounds)

stories260K, ten clients (one per role), four of them a round. A seed decides the split of rows, the cohorts,
the batches and the directions; arms of one seed share all of that but the directions. Arms:

    fedkseed       the run file: K = 1024 sign directions, 12 rounds of 20 steps, one integer a step
    gaussian       the published loop with normal directions instead (`run_published_loop`, written here and
    no
                   part of the product): `torch.manual_seed`, `torch.randn`, weights moved in place and back;
                   same cohorts, same batches, same candidate at each step, same learning rate
    gaussian-again the same with other draws: how far the directions alone move the result
    signs-loop     the same loop with signs drawn by torch: the estimators with everything else equal
    pro-loop       signs-loop, its candidates drawn by the published amplitudes of FedKSeed-Pro: of all raw
                   scalars that the server has seen of a candidate, and one zero
    fedkseed-pro   the run file with mode = "fedkseed-pro"
    first-order    the steps of ferret_shakespeare.toml, their change sent whole: the line to reach
    ferret-signs   ferret_shakespeare.toml: ten first-order steps a round, projected on sign directions
    ferret-4096    the same with four times as many coefficients
    ferret-srht    the same as ferret-signs with the randomised Hadamard transform
    ferret-norm    the same as ferret-signs, its coefficients shared out by how far tensors have moved
    ferret-sets    the same as ferret-signs with sixteen sets of directions, so that nearly all clients of a
                   round have directions of their own
    lora           first-order LoRA with as many forward passes (a pass with gradients counts as three)

Each arm and seed leaves OUT/ARM-SEED.json; what is there is not run again. Learning rates were chosen on seed
100. Printed at the end: the table over seeds (mean, lowest to highest), the rounds that Ferret takes to
FedKSeed's final loss of the same seed, and the cosine of several compressions against their bytes, on the
changes of ten first-order steps. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedpeft.codec import PublicSource, coded, select_unbiased_random_k, top_k
from fedpeft.config.run_file import load_run
from fedpeft.config.sections import RunConfig
from fedpeft.data.collate import Batch, collate, training_batches
from fedpeft.evaluation.evaluate import summarise
from fedpeft.evaluation.scoring import score
from fedpeft.ledger import RunFolder
from fedpeft.ledger.records import Round, Started, parse_row
from fedpeft.participant.load_simulation import load_simulated_run
from fedpeft.participant.loaded_run import LoadedRun
from fedpeft.planning.preflight import refuse_problems
from fedpeft.reporting.progress import make_progress
from fedpeft.runtime.randomness import stream
from fedpeft.simulation.engine import simulate
from fedpeft.simulation.parallel_scoring import TEST, batches_of, rows_of
from fedpeft.training.losses import PRECISE_LOSSES
from fedpeft.wire.codec import Envelope, encode

HERE = Path(__file__).resolve().parent
SEEDS = (0, 1, 2)
Draw = Callable[[torch.Size], torch.Tensor]
Chances = np.ndarray[Any, np.dtype[np.float64]]


def signs(shape: torch.Size) -> torch.Tensor:
    """+1 or -1, evenly."""
    return 2.0 * torch.randint(0, 2, shape) - 1.0


@dataclass(frozen=True)
class Loop:
    """An arm of the published loop: a draw, where its seeds begin, whether amplitudes choose candidates."""

    draw: Draw
    offset: int
    weighted: bool = False


LOOPS: Mapping[str, Loop] = {
    "gaussian": Loop(torch.randn, 0),
    "gaussian-again": Loop(torch.randn, 1000),
    "signs-loop": Loop(signs, 2000),
    "pro-loop": Loop(signs, 2000, weighted=True),
}

FEDKSEED = ("fedkseed_shakespeare.toml", {"evaluation.every": "4"})
FERRET = ("ferret_shakespeare.toml", {"run.rounds": "4", "evaluation.every": "1"})
ARMS: Mapping[str, tuple[str, Mapping[str, str]]] = {  # name to run file and overrides
    "fedkseed": FEDKSEED,
    **dict.fromkeys(LOOPS, FEDKSEED),
    "fedkseed-pro": (FEDKSEED[0], {**FEDKSEED[1], "space.mode": "fedkseed-pro"}),
    "first-order": (FERRET[0], {**FERRET[1], "space": "{kind='adapter-delta'}"}),
    "ferret-signs": FERRET,
    "ferret-4096": (FERRET[0], {**FERRET[1], "space.num_seeds": "4096"}),
    "ferret-srht": (FERRET[0], {**FERRET[1], "space.projection": "srht"}),
    "ferret-norm": (FERRET[0], {**FERRET[1], "space.allocation": "norm"}),
    "ferret-sets": (FERRET[0], {**FERRET[1], "space.direction_sets": "16"}),
    "lora": (
        "shakespeare_stories260k.toml",
        {
            "run.rounds": "12",
            "data.heldout": "0.1",
            "data.max_length": "64",
            "data.partitioner.clients": "10",
            "training.batch_size": "8",
            "training.steps": "13",  # 13 x 3 passes against 20 x 2
            "federation.sampling": "{kind='fixed', cohort=4}",
            "evaluation.every": "4",
            "evaluation.baselines": "false",
        },
    ),
}
QUICK = {"run.rounds": "2", "evaluation.every": "1", "training.steps": "5"}


@dataclass(frozen=True)
class Result:
    """One arm with one seed.

    Attributes:
        curve: round and mean loss on all clients' held-out rows, nats per token; round 0 is the base model.
        bytes_up, bytes_down: of one message, mean over clients and rounds; 0 for the published loop.
        cpu_s: of this process, set-up included.
    """

    arm: str
    seed: int
    curve: list[tuple[int, float]]
    bytes_up: float
    bytes_down: float
    cpu_s: float
    trained: int
    versions: dict[str, str]
    overrides: dict[str, str]

    @property
    def first(self) -> float:
        """The loss of the pretrained model."""
        return self.curve[0][1]

    @property
    def final(self) -> float:
        """The loss after the last round."""
        return self.curve[-1][1]


def run_of(arm: str, seed: int, quick: bool) -> tuple[RunConfig, dict[str, str]]:
    """The run of an arm, and what it overrides in its run file."""
    file, overrides = ARMS[arm]
    changes = {**overrides, **(QUICK if quick else {}), "run.seed": str(seed)}
    run = load_run(HERE / file, [f"{key}={value}" for key, value in changes.items()])
    refuse_problems(run, source=file)
    return run, changes


def run_arm(arm: str, seed: int, out: Path, quick: bool) -> Result:
    """An arm of the product, by `fedpeft simulate`'s own engine."""
    began = time.process_time()
    run, changes = run_of(arm, seed, quick)
    with RunFolder.create(out / "runs" / f"{arm}-{seed}", run, force=True) as folder:
        with make_progress("quiet") as progress:
            simulate(folder, workers=1, engine="local", progress=progress)
        rows = [parse_row(line) for line in (folder.path / "metrics.jsonl").read_bytes().splitlines()]
    started = next(row for row in rows if isinstance(row, Started))
    rounds = [row for row in rows if isinstance(row, Round)]
    outcomes = [outcome for row in rounds for outcome in row.outcomes]
    return Result(
        arm,
        seed,
        [(row.round, row.evaluation.scores["loss"].value) for row in rounds if row.evaluation is not None],
        statistics.fmean(outcome.bytes_up for outcome in outcomes),
        statistics.fmean(outcome.bytes_down for outcome in outcomes),
        time.process_time() - began,
        started.trainable_parameters,
        dict(started.versions),
        changes,
    )


def cohorts_of(out: Path, seed: int) -> list[list[str]]:
    """Who was asked in each round of the sign arm."""
    lines = (out / "runs" / f"fedkseed-{seed}" / "metrics.jsonl").read_bytes().splitlines()
    rows = [row for row in map(parse_row, lines) if isinstance(row, Round) and row.round > 0]
    return [[outcome.client for outcome in row.outcomes] for row in rows]


def run_published_loop(arm: str, seed: int, out: Path, quick: bool) -> Result:
    """FedKSeed with normal directions, as published: seeds, in-place moves, float scalars.

    Source: Qin et al. 2024, algorithm 1, and for weighted arms the non-uniform sampling of FedKSeed-Pro. The
    server's model is moved by each round's scalars alone, which equals a replay from the start up to
    rounding.
    """
    began = time.process_time()
    run, changes = run_of(arm, seed, quick)
    loop = LOOPS[arm]
    draw = loop.draw
    resident = load_simulated_run(run)
    parameters = [parameter for _, parameter in sorted(resident.parameters.items())]
    names = {client.name: client for client in resident.data.clients}
    seeds = np.random.default_rng(loop.offset + seed).integers(1, 2**31, size=run.space.options["num_seeds"])
    state = [parameter.detach().clone() for parameter in parameters]
    sizes, visits = np.zeros(len(seeds)), np.ones(len(seeds))  # of a candidate's scalars, and one zero
    curve = [(0, compute_held_out_loss(resident))]
    for number, cohort in enumerate(cohorts_of(out, seed), start=1):
        total = sum(len(names[name].train) for name in cohort)
        moves: dict[int, float] = {}
        chances = amplitude_chances(sizes / visits) if loop.weighted else None
        for name in cohort:
            put(parameters, state)
            share = len(names[name].train) / total
            rng = stream(seed, "train", name, number)
            for direction, scalar in client_steps(resident, names[name].train, seeds, draw, rng, chances):
                moves[direction] = moves.get(direction, 0.0) + share * scalar
                sizes[direction] += min(abs(scalar), 1000.0)  # the published bound
                visits[direction] += 1
        put(parameters, state)
        for direction, scalar in moves.items():
            move(parameters, int(seeds[direction]), -run.training.lr * scalar, draw)
        state = [parameter.detach().clone() for parameter in parameters]
        if number % run.evaluation.every == 0:
            curve.append((number, compute_held_out_loss(resident)))
    cpu_s = time.process_time() - began
    trained = sum(parameter.numel() for parameter in parameters)
    return Result(arm, seed, curve, 0.0, 0.0, cpu_s, trained, {"torch": torch.__version__}, changes)


def amplitude_chances(amplitude: np.ndarray[Any, np.dtype[np.float64]]) -> Chances:
    """The softmax of amplitudes that are scaled to 0 and 1; even chances where all are equal."""
    spread = float(amplitude.max() - amplitude.min())
    weight = np.exp((amplitude - amplitude.min()) / spread) if spread > 0 else np.ones(len(amplitude))
    return np.asarray(weight / weight.sum(), dtype=np.float64)


def client_steps(
    resident: LoadedRun,
    indices: np.ndarray[Any, np.dtype[np.int64]],
    seeds: np.ndarray[Any, np.dtype[np.int64]],
    draw: Draw,
    rng: np.random.Generator,
    chances: Chances | None,
) -> Iterator[tuple[int, float]]:
    """The local steps of one client: (candidate, scalar) of each; all candidates alike without `chances`."""
    section, parameters = resident.run.training, [p for _, p in sorted(resident.parameters.items())]
    steps = section.steps or 1
    if chances is None:
        route = rng.integers(0, len(seeds), size=steps, dtype=np.int64)
    else:
        route = rng.choice(len(seeds), size=steps, p=chances).astype(np.int64)
    rows = resident.rows(resident.data.rows, indices)
    order = training_batches(rows.encoded, indices, section.batch_size, steps, rng)
    for direction in route.tolist():
        batch, seed = collate(rows.encoded, next(order), rows.pad_id, task=rows.task), int(seeds[direction])
        move(parameters, seed, section.radius, draw)
        above = batch_loss(resident.model, batch)
        move(parameters, seed, -2 * section.radius, draw)
        below = batch_loss(resident.model, batch)
        move(parameters, seed, section.radius, draw)
        scalar = (above - below) / (2 * section.radius)
        move(parameters, seed, -section.lr * scalar, draw)
        yield direction, scalar


@torch.no_grad()
def move(parameters: Sequence[nn.Parameter], seed: int, length: float, draw: Draw) -> None:
    """Theta += length * z, in place."""
    torch.manual_seed(seed)
    for parameter in parameters:
        parameter.add_(draw(parameter.shape), alpha=length)


@torch.no_grad()
def put(parameters: Sequence[nn.Parameter], state: Sequence[torch.Tensor]) -> None:
    """Copy a state into the model."""
    for parameter, value in zip(parameters, state, strict=True):
        parameter.copy_(value)


@torch.no_grad()
def batch_loss(model: nn.Module, batch: Batch) -> float:
    """Mean loss of one batch, nats per token."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return PRECISE_LOSSES["causal-lm"](logits, batch.labels) / batch.tokens


def compute_held_out_loss(resident: LoadedRun) -> float:
    """The loss that `fedpeft simulate` reports, of the weights as they are."""
    encoded, _ = rows_of(resident, TEST)
    rows = resident.rows(encoded, np.zeros(0, dtype=np.int64))
    batches = batches_of(resident, TEST)
    columns = score(resident.model, resident.tokenizer, rows, batches, ["loss"], max_new_tokens=1)
    rng = np.random.default_rng(0)
    return summarise(columns, ["loss"], clients={}, resamples=2, rng=rng).scores["loss"].value


Arrays = Mapping[str, np.ndarray[Any, np.dtype[np.float32]]]


@dataclass(frozen=True)
class Point:
    """One compression of one change: its bytes on the wire, and the cosine with the change itself."""

    method: str
    setting: str
    payload_bytes: int
    cosine: float


def compressions(seed: int, quick: bool) -> list[Point]:
    """Several compressions of the change that one client's ten first-order steps make.

    Projections travel as the space's own message; values of top-k and random-k travel as our stages code
    them, positions of top-k entropy-coded and those of random-k not at all, with 4 bytes a value.
    """
    counts = (64,) if quick else (16, 64, 256, 1024, 4096)
    points = [_project(kind, count, seed, quick) for kind in ("signs", "srht") for count in counts]
    delta = _change(seed, quick)
    compressors: dict[str, Callable[[int, str, float], Any]] = {
        "top-k": lambda place, name, share: top_k(delta[name], share),
        "random-k": lambda place, name, share: select_unbiased_random_k(
            delta[name], share, PublicSource(seed, 1, place)
        ),
    }
    for method, compress in compressors.items():
        for share in (0.01,) if quick else (0.001, 0.003, 0.01, 0.03, 0.1, 0.3):
            encoded = {name: compress(place, name, share) for place, name in enumerate(sorted(delta))}
            size = sum(len(coded.encode(tensor)) for tensor in encoded.values())
            copy = {name: tensor.dense() for name, tensor in encoded.items()}
            points.append(Point(method, f"k = {share:.1%}", size, cosine(delta, copy)))
    return points


def _project(projection: str, count: int, seed: int, quick: bool) -> Point:
    """Through the space itself: express, serialise, rebuild."""
    file, _ = ARMS["ferret-signs"]
    changes = {"run.seed": seed, "space.projection": projection, "space.num_seeds": count}
    changes |= {"training.steps": 2} if quick else {}
    run = load_run(HERE / file, [f"{key}={value}" for key, value in changes.items()])
    resident = load_simulated_run(run)
    state = resident.space.initial_state(resident.parameters)
    before = _values(resident)
    update, _ = resident.train_client(0, 1, state, proximal_mu=0.0)
    delta = {name: after - before[name] for name, after in _values(resident).items()}
    # The size of a full message; its header is about 150 bytes.
    envelope = Envelope(update.arrays, resident.run_digest, 1, resident.run_digest, run.space.kind)
    change = {name: array.astype(np.float64) for name, array in update.arrays.items()}
    resident.space.enter(resident.parameters, resident.space.apply(state, change))
    copy = {name: after - before[name] for name, after in _values(resident).items()}
    coefficients = sum(array.size for array in update.arrays.values())
    return Point(projection, f"{coefficients:,} coefficients", len(encode(envelope)), cosine(delta, copy))


def _change(seed: int, quick: bool) -> Arrays:
    changes = {"run.seed": seed, **({"training.steps": 2} if quick else {})}
    run = load_run(HERE / ARMS["ferret-signs"][0], [f"{key}={value}" for key, value in changes.items()])
    resident = load_simulated_run(run)
    state, before = resident.space.initial_state(resident.parameters), _values(resident)
    resident.train_client(0, 1, state, proximal_mu=0.0)
    return {name: after - before[name] for name, after in _values(resident).items()}


def _values(resident: LoadedRun) -> Arrays:
    return {name: parameter.detach().numpy().copy() for name, parameter in resident.parameters.items()}


def cosine(one: Arrays, other: Arrays) -> float:
    """Of all tensors as one vector."""
    product = sum(float(np.sum(one[name].astype(float) * other[name])) for name in one)
    norms = [math.sqrt(sum(float(np.sum(a.astype(float) ** 2)) for a in x.values())) for x in (one, other)]
    return product / (norms[0] * norms[1])


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean, and the lowest and highest."""
    low, high = min(values), max(values)
    return f"{statistics.fmean(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def row(*cells: object) -> str:
    """A line of a markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def arms_table(results: Mapping[tuple[str, int], Result], seeds: Sequence[int]) -> Iterator[str]:
    """Final losses and bytes, arm by arm."""
    yield row(
        "arm", "rounds", "held-out loss", "against fedkseed, same seed", "bytes up", "bytes down", "CPU s"
    )
    yield row("---", *["---:"] * 6)
    base = [results["fedkseed", seed].first for seed in seeds]
    yield row("pretrained", 0, spread(base), "", "", "", "")
    for arm in ARMS:
        found = [results[arm, seed] for seed in seeds]
        gaps = [r.final - results["fedkseed", seed].final for r, seed in zip(found, seeds, strict=True)]
        up, down = (
            f"{statistics.fmean(getattr(r, key) for r in found):,.0f}" for key in ("bytes_up", "bytes_down")
        )
        yield row(
            arm,
            found[0].curve[-1][0],
            spread([r.final for r in found]),
            "" if arm == "fedkseed" else spread(gaps),
            *(["–", "–"] if arm in LOOPS else [up, down]),
            f"{statistics.fmean(r.cpu_s for r in found):.0f}",
        )


def curve_table(results: Mapping[tuple[str, int], Result], seeds: Sequence[int]) -> Iterator[str]:
    """Mean loss over seeds, round by round."""
    numbers = sorted({number for result in results.values() for number, _ in result.curve})
    yield row("mean loss after round", *numbers)
    yield row("---", *["---:"] * len(numbers))
    for arm in ARMS:
        curves = [dict(results[arm, seed].curve) for seed in seeds]
        means = [statistics.fmean(c[n] for c in curves) if n in curves[0] else None for n in numbers]
        yield row(arm, *("" if mean is None else f"{mean:.3f}" for mean in means))


def first_reaching(result: Result, goal: float) -> int | None:
    """The first evaluated round with a loss at or below the goal."""
    return next((number for number, loss in result.curve if loss <= goal), None)


def points_table(points: Mapping[int, list[Point]]) -> Iterator[str]:
    """Cosine against bytes, mean over seeds."""
    yield row("method", "setting", "bytes", "cosine", "cosine per KB")
    yield row("---", "---", *["---:"] * 3)
    for same in zip(*points.values(), strict=True):
        size = statistics.fmean(point.payload_bytes for point in same)
        angle = statistics.fmean(point.cosine for point in same)
        yield row(
            same[0].method,
            same[0].setting,
            f"{size:,.0f}",
            spread([point.cosine for point in same]),
            f"{1000 * angle / size:.3f}",
        )


def main() -> None:
    """Run what is missing, print the tables and one JSON object."""
    parser = argparse.ArgumentParser(description="quality of training by seed-scalars")
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--quick", action="store_true", help="one seed, two rounds of five steps")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds = SEEDS[:1] if arguments.quick else SEEDS
    results: dict[tuple[str, int], Result] = {}
    for seed in seeds:
        for arm in ARMS:
            results[arm, seed] = one(arm, seed, arguments.out, arguments.quick)
    points = {seed: compressions(seed, arguments.quick) for seed in seeds}
    print("\n".join([*arms_table(results, seeds), "", *curve_table(results, seeds), ""]))
    goals = {seed: results["fedkseed", seed].final for seed in seeds}
    rounds = {
        arm: [first_reaching(results[arm, seed], goals[seed]) for seed in seeds]
        for arm in ("ferret-signs", "ferret-srht")
    }
    print(f"rounds to FedKSeed's final loss, seed by seed: {rounds}\n")
    print("\n".join(points_table(points)))
    final = {f"{arm}-{seed}": round(result.final, 4) for (arm, seed), result in results.items()}
    print(json.dumps({"final_loss": final, "rounds_to_fedkseed": rounds}))


def one(arm: str, seed: int, out: Path, quick: bool) -> Result:
    """An arm with a seed: from its file, or run now."""
    file = out / f"{arm}-{seed}.json"
    if file.exists():
        read = json.loads(file.read_text())
        return Result(**{**read, "curve": [tuple(pair) for pair in read["curve"]]})
    out.mkdir(parents=True, exist_ok=True)
    make = run_published_loop if arm in LOOPS else run_arm
    result = make(arm, seed, out, quick)
    file.write_text(json.dumps(asdict(result), indent=1))
    return result


if __name__ == "__main__":
    main()
