"""What do hostile clients cost, rule by rule? LoRA on TREC, 3 of 15 clients attack; three seeds.

    python simulations/quality_byzantine.py --out runs/byzantine                     (45 minutes, one core)
    python simulations/quality_byzantine.py --out runs/byzantine --arms "Krum, product" --seeds 0
    python simulations/quality_byzantine.py --out runs/byzantine --quick             (1 minute: four arms)

The trained model is small on purpose, so that hundreds of runs are affordable: MiniLM's mean-pooled sentence
embeddings are computed once and frozen, as the embedding table of a model without layers in which each
sentence is one token (OUT/frozen). Trained are LoRA (r = 4) on the dense layer that follows, which starts at
the identity, and the head: 5,382 parameters. Clients: Dirichlet(1) over the six classes; all are asked, each
counts the same; `ROUNDS` rounds of `STEPS` Adam steps. Attackers are drawn from the seed, 3 of 15, the most
that Bulyan takes (n >= 4 f + 3); rules that ask for a number are told 3. Attacks, with their strengths:

    sign flip, x 3    scaled, x 10    noise, 10 x as large as the update    label flip, c to 5 - c
    ALIE, z = 1.5     inner product, epsilon = 0.5     gauge: the honest product in factors ten times as
                      large and as small, turned at random; it harms nobody who looks at products

Each rule that has a geometry runs in both: entries of the factors, or products B A. The last lines are of
common directions in the exact seed space: the head alone, 20 rounds along 32 directions each that all clients
measure, so that a trimmed mean per scalar is one per direction; three of the attacks, at 50 s a run.

Each arm and seed leaves OUT/seed-SEED/ARM.json; what is there is not run again.

Expected: a markdown table, a line for each rule and geometry, a column for each attack: test accuracy after
the last round, mean over seeds (lowest to highest). The last line of output is one JSON list of all runs.

Needs the model: pip install "fedpeft[bench]"
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

import fedpeft
from fedpeft import Round, Started, load_run
from fedpeft.models.base_model import model_path
from fedpeft.runtime.files import folder_atomically, write_atomically
from simulations.experiment_cli import is_wanted, options, percent, seeds_of

RUN_FILE = Path(__file__).resolve().with_name("byzantine_trec.toml")
CLIENTS, HOSTILE = 15, 3
ROUNDS, STEPS, COMMON_ROUNDS = 6, 2, 20
SETTING = (
    f"run.rounds={ROUNDS}",
    "peft={method='lora', r=4, lora_alpha=8, target_modules=['dense']}",
    "data.max_length=4",
    f"training={{optimizer='adam', lr=2e-2, steps={STEPS}, batch_size=32}}",
    f"evaluation={{metrics=['accuracy'], every={ROUNDS}, bootstrap=1}}",
)
COMMON = (
    "peft={method='head'}",
    "space={kind='seed-scalars', mode='common', num_seeds=32}",
    "training={kind='zeroth-order', lr=5e-3, radius=1e-3, steps=32, batch_size=64}",
    f"run.rounds={COMMON_ROUNDS}",
    f"evaluation={{metrics=['accuracy'], every={COMMON_ROUNDS}, bootstrap=1}}",
)

ATTACKS: Mapping[str, str] = {  # the options of [federation.attack]; none: all are honest
    "none": "",
    "sign flip": "kind='sign-flip', scale=3.0",
    "scaled": "kind='scaled', scale=10.0",
    "noise": "kind='noise', scale=10.0",
    "label flip": "kind='label-flip'",
    "ALIE": "kind='alie', z=1.5",
    "inner product": "kind='inner-product', scale=0.5",
    "gauge": "kind='gauge', scale=10.0",
}


COMMON_ATTACKS = ("none", "sign flip", "ALIE")


@dataclass(frozen=True)
class Rule:
    """A line of the table: a strategy and its options, and what else it changes in the run."""

    strategy: str
    geometries: tuple[str, ...] = ("entries", "product")
    setting: tuple[str, ...] = ()


RULES: Mapping[str, Rule] = {
    "FedAvg": Rule("kind='fedavg'", ("",)),
    "norm bound, median": Rule("kind='norm-bound'"),
    "trimmed mean, 0.2": Rule("kind='fedtrimmedavg', beta=0.2"),
    "median": Rule("kind='fedmedian'"),
    "Krum": Rule(f"kind='krum', num_malicious_nodes={HOSTILE}"),
    "MultiKrum, 12 of 15": Rule(
        f"kind='multikrum', num_malicious_nodes={HOSTILE}, num_nodes_to_select={CLIENTS - HOSTILE}"
    ),
    "Bulyan": Rule(f"kind='bulyan', num_malicious_nodes={HOSTILE}"),
    "geometric median": Rule("kind='geometric-median'"),
    "common directions, FedAvg": Rule("kind='fedavg'", ("",), COMMON),
    "common directions, trimmed mean, 0.2": Rule("kind='fedtrimmedavg', beta=0.2", ("scalars",), COMMON),
}


@dataclass(frozen=True)
class Arm:
    """One cell of the table."""

    rule: str
    geometry: str
    attack: str

    @property
    def name(self) -> str:
        """As `--arms` finds it."""
        return f"{self.rule}, {self.geometry or 'mean'}, {self.attack}"

    @property
    def file(self) -> str:
        """Without what file systems dislike."""
        return "".join(c if c.isalnum() or c in ".-" else "-" for c in self.name) + ".json"


ARMS = tuple(
    Arm(name, geometry, attack)
    for name, rule in RULES.items()
    for geometry in rule.geometries
    for attack in ATTACKS
    if not rule.setting or attack in COMMON_ATTACKS
)
QUICK_ARMS = tuple(
    Arm(rule, geometry, attack)
    for rule, geometry in (("FedAvg", ""), ("MultiKrum, 12 of 15", "product"))
    for attack in ("none", "sign flip")
)


@dataclass(frozen=True)
class Result:
    """One finished run.

    Attributes:
        accuracy: on the test set, after the last round; a share of one.
        refused: updates that the server refused, all rounds.
        cpu_s: of this process, set-up included.
    """

    rule: str
    geometry: str
    attack: str
    seed: int
    accuracy: float
    loss: float
    refused: int
    rounds: int
    trained: int
    cpu_s: float
    versions: Mapping[str, str]


def make_frozen_folder(out: Path, overrides: Sequence[str]) -> Path:
    """The frozen encoder's output as a model and two JSONL files; made once."""
    folder = out / "frozen"
    if folder.is_dir():
        return folder
    run = load_run(RUN_FILE, overrides)
    files = {"train": str(run.data.train), "test": str(run.data.test)}
    rows = {
        name: [json.loads(line) for line in Path(file).read_text().splitlines()]
        for name, file in files.items()
    }
    texts = [str(row["text"]) for several in rows.values() for row in several]
    embedded = sentence_embeddings(texts, model_path(run.model))
    out.mkdir(parents=True, exist_ok=True)
    with folder_atomically(folder) as fresh:
        save_model(embedded, fresh / "model")
        number = 0
        for name, several in rows.items():
            with open(fresh / f"{name}.jsonl", "w") as file:
                for row in several:
                    file.write(json.dumps({"text": f"s{number}", "label_name": row["label_name"]}) + "\n")
                    number += 1
    return folder


def sentence_embeddings(texts: Sequence[str], path: str) -> NDArray[np.float32]:
    """The mean over tokens of MiniLM's last layer, float32 [texts, 384]."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    order = np.argsort([len(text) for text in texts], kind="stable")
    result = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)
    with torch.no_grad():
        for start in range(0, len(order), 64):
            batch = order[start : start + 64]
            tokens = tokenizer(
                [texts[place] for place in batch],
                padding=True,
                truncation=True,
                max_length=64,
                return_tensors="pt",
            )
            hidden, mask = model(**tokens).last_hidden_state, tokens["attention_mask"][..., None].float()
            result[batch] = ((hidden * mask).sum(1) / mask.sum(1)).numpy()
    return result


def save_model(embedded: NDArray[np.float32], folder: Path) -> None:
    """A BERT without layers: a sentence's embedding, layer norm, a dense layer at the identity, tanh."""
    words = ["[PAD]", "[UNK]", *(f"s{number}" for number in range(len(embedded)))]
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=embedded.shape[1],
        num_hidden_layers=0,
        num_attention_heads=12,
        intermediate_size=embedded.shape[1],
        max_position_embeddings=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embeddings.word_embeddings.weight[2:] = torch.from_numpy(embedded)
        model.embeddings.LayerNorm.weight.fill_(1.0)
        model.pooler.dense.weight.copy_(torch.eye(embedded.shape[1]))
    model.save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder
    )


def overrides_of(arm: Arm, frozen: Path) -> list[str]:
    """What the arm changes in the run file."""
    rule, attack = RULES[arm.rule], ATTACKS[arm.attack]
    geometry = f", geometry='{arm.geometry}'" if arm.geometry in ("entries", "product") else ""
    keys = [f"strategy={{{rule.strategy}{geometry}}}", "sampling={kind='all'}", "weighting='uniform'"]
    if attack:
        keys.append(f"attack={{{attack}, fraction={HOSTILE / CLIENTS}}}")
    return [
        f"model.path={frozen / 'model'}",
        f"data.train={frozen / 'train.jsonl'}",
        f"data.test={frozen / 'test.jsonl'}",
        *SETTING,
        *rule.setting,
        f"federation={{{', '.join(keys)}}}",
    ]


def run(arm: Arm, seed: int, frozen: Path, further: Sequence[str]) -> Result:
    """Hold one run from start to end."""
    began = time.process_time()
    config = load_run(RUN_FILE, [*overrides_of(arm, frozen), *further, f"run.seed={seed}"])
    with tempfile.TemporaryDirectory() as place:
        rows = fedpeft.simulate(config, out=Path(place) / "run").rows
    started = next(row for row in rows if isinstance(row, Started))
    rounds = [row for row in rows if isinstance(row, Round)]
    last = rounds[-1].evaluation
    if last is None:
        raise SystemExit(f"{arm.name}: the last round was not evaluated")
    return Result(
        **asdict(arm),
        seed=seed,
        accuracy=last.scores["accuracy"].value,
        loss=last.scores["loss"].value,
        refused=sum(outcome.status == "refused" for row in rounds for outcome in row.outcomes),
        rounds=rounds[-1].round,
        trained=started.trainable_parameters,
        cpu_s=time.process_time() - began,
        versions=started.versions,
    )


def load_or_make(path: Path, arm: Arm, seed: int, frozen: Path, further: Sequence[str]) -> Result:
    """The result that lies at `path`; it is made first if there is none."""
    if not path.is_file():
        result = run(arm, seed, frozen, further)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(result)).encode())
        told = f"{result.accuracy:.1%}, loss {result.loss:.3f}, CPU {result.cpu_s:.1f} s"
        print(f"seed {seed}  {arm.name}  {told}", file=sys.stderr, flush=True)
    fields: dict[str, Any] = json.loads(path.read_text())
    return Result(**fields)


def table(results: Iterable[Result]) -> str:
    """The results as markdown."""
    cells: dict[Arm, list[Result]] = {}
    for result in results:
        cells.setdefault(Arm(result.rule, result.geometry, result.attack), []).append(result)
    lines = [f"| rule | geometry | {' | '.join(ATTACKS)} |", f"| --- | --- |{' ---: |' * len(ATTACKS)}"]
    for name, rule in RULES.items():
        for geometry in rule.geometries:
            row = [cells.get(Arm(name, geometry, attack), []) for attack in ATTACKS]
            shown = [percent([result.accuracy for result in cell], 0) for cell in row]
            if any(row):
                lines.append(f"| {name} | {geometry or '–'} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, seed by seed, and print the table."""
    parser = options(__doc__, quick="four arms, seed 0")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    frozen = make_frozen_folder(arguments.out.resolve(), arguments.set)
    results = []
    for seed in seeds_of(arguments):
        for arm in QUICK_ARMS if arguments.quick else ARMS:
            path = arguments.out / f"seed-{seed}" / arm.file
            if is_wanted(arm.name, arguments) or path.is_file():
                results.append(load_or_make(path, arm, seed, frozen, arguments.set))
    print(table(results))
    print(json.dumps([asdict(result) for result in results]))


if __name__ == "__main__":
    main()
