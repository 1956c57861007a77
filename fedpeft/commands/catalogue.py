"""What a run file can name, from the tables; torch is not imported, so that the list is there at once.

Spaces, optimisers and schedules live beside torch code. Their lines are kept here, and a test holds them
against their tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedpeft.aggregation.lora_rules import LORA_RULES, LoraRule
from fedpeft.aggregation.staleness import WEIGHTS
from fedpeft.attacks import ATTACKS
from fedpeft.evaluation.metrics import METRICS, TASKS
from fedpeft.models.methods import METHODS, Method
from fedpeft.privacy.kinds import KINDS
from fedpeft.rounds.strategy_table import RULES
from fedpeft.stages import STAGES
from fedpeft.training.lean import SAVERS
from fedpeft.training.zeroth_rules import RULES as ZEROTH_RULES


@dataclass(frozen=True)
class CatalogueEntry:
    """One name: what it is in a line, and what else must be known of it in a word or two each."""

    name: str
    summary: str
    flags: tuple[str, ...] = ()


SPACES = {
    "adapter-delta": "the difference of the trainable parameters, float32",
    "projected": "integer coefficients of a change on shared directions (Shu et al. 2025, Ferret)",
    "seed-scalars": "integer scalars of seeded directions, exact (Qin et al. 2024, FedKSeed)",
}
OPTIMIZERS = {
    "sgd": "gradient steps, with training.momentum if asked",
    "adam": "moments of the gradient (Kingma, Ba 2015)",
    "adamw": "Adam with decoupled weight decay (Loshchilov, Hutter 2019)",
    "adagrad": "steps shrink with the summed squares (Duchi et al. 2011)",
    "adafactor": "Adam with factored second moments, little memory (Shazeer, Stern 2018)",
    "rmsprop": "steps over a running root mean square (Hinton 2012)",
    "galore": "AdamW in a subspace of each matrix's gradient (Zhao et al. 2024), training.projection_rank",
    "adamw8bit": "AdamW with moments of eight bits (Dettmers et al. 2021), extra quant",
    "paged-adamw": "AdamW whose moments leave a full GPU, CUDA only, extra quant",
    "paged-adamw8bit": "the same with moments of eight bits, CUDA only, extra quant",
}
SCHEDULES = {
    "constant": "training.lr throughout, after training.warmup_steps",
    "linear": "falls to zero over the round's local steps",
    "cosine": "falls to zero along half a cosine",
}
PARTITIONERS = {
    "iid": "rows at random, equally many each",
    "linear": "sizes grow linearly with the client's number",
    "square": "sizes grow with its square",
    "exponential": "sizes grow exponentially",
    "dirichlet": "shares of each value of a column drawn from Dirichlet(alpha)",
    "pathological": "each client holds a few values of a column only",
    "shard": "rows sorted by a column, cut into shards, dealt out",
    "natural": "one client per value of a column",
    "files": "one file, one client",
}
QUANTIZATION = {
    "none": "weights as model.dtype says",
    "int8": "8-bit weights (LLM.int8, Dettmers et al. 2022), extra quant",
    "nf4": "4-bit normal floats, double quantisation (QLoRA, Dettmers et al. 2023), extra quant",
    "fp4": "4-bit floats, double quantisation, extra quant",
    "rtn8": "8-bit integers, one scale per row or model.group_size columns, rounded to nearest",
    "rtn4": "4-bit integers, the same; scales can be trained (peft.method 'peqa')",
}
SAMPLING = {
    "all": "every client, every round",
    "fraction": "a fixed share of the clients",
    "fixed": "a fixed number of clients",
    "poisson": "each client by its own coin",
}


def catalogue() -> dict[str, tuple[CatalogueEntry, ...]]:
    """Every section of names, by the run file's key."""
    return {
        "peft.method": tuple(_method(method) for method in METHODS.values()),
        "model.quantization": _entries(QUANTIZATION),
        "data.partitioner": _entries(PARTITIONERS),
        "training.optimizer": _entries(OPTIMIZERS),
        "training.schedule": _entries(SCHEDULES),
        "training (memory)": tuple(
            CatalogueEntry(
                name, saver.summary, (f"saves {saver.saves}", *(("CUDA only",) if saver.cuda else ()))
            )
            for name, saver in SAVERS.items()
        ),
        "training.rule": tuple(
            CatalogueEntry(name, rule.summary, () if rule.replays else ("adapter-delta only",))
            for name, rule in ZEROTH_RULES.items()
        ),
        "space": _entries(SPACES),
        "stages": tuple(CatalogueEntry(name, _first_line(stage)) for name, stage in STAGES.items()),
        "federation.strategy": tuple(
            CatalogueEntry(name, rule.summary, () if rule.folds else ("holds all updates",))
            for name, rule in RULES.items()
        ),
        "federation.lora_rule": tuple(
            CatalogueEntry(name, rule.summary, _lora_flags(rule)) for name, rule in LORA_RULES.items()
        ),
        "federation.sampling": _entries(SAMPLING),
        "federation.attack": tuple(
            CatalogueEntry(name, _first_line(attack), ("in simulations",)) for name, attack in ATTACKS.items()
        ),
        "federation.buffer.staleness_weight": tuple(
            CatalogueEntry(name, _first_line(weight)) for name, weight in WEIGHTS.items()
        ),
        "privacy": tuple(
            CatalogueEntry(name, kind.summary, () if kind.joint else ("per client",))
            for name, kind in KINDS.items()
        ),
        "evaluation.metrics": tuple(
            CatalogueEntry(
                name,
                metric.summary,
                (*_tasks(tuple(metric.tasks)), *(("generates",) if metric.generates else ())),
            )
            for name, metric in METRICS.items()
        ),
    }


def _method(method: Method) -> CatalogueEntry:
    """Flags that matter to a federation."""
    flags = [
        *_tasks(method.tasks),
        *(
            word
            for word, holds in (
                ("linear", method.linear_in_trained),
                ("no merge", not method.mergeable),
                ("needs biases", method.needs_bias),
                ("no " + "/".join(sorted(method.refused_quantization)), bool(method.refused_quantization)),
            )
            if holds
        ),
    ]
    return CatalogueEntry(method.name, method.summary, tuple(flags))


def _lora_flags(rule: LoraRule) -> tuple[str, ...]:
    """What it asks of a run beyond averaging."""
    words = (
        ("ranks may differ", rule.ranks),
        ("holds all updates", rule.products),
        ("own models", rule.keeps),
    )
    return tuple(word for word, holds in words if holds)


def _tasks(tasks: tuple[str, ...]) -> tuple[str, ...]:
    """Only a restriction is worth a word."""
    return () if set(tasks) == set(TASKS) else tuple(f"{task} only" for task in tasks)


def _entries(lines: Mapping[str, str]) -> tuple[CatalogueEntry, ...]:
    return tuple(CatalogueEntry(name, summary) for name, summary in lines.items())


def _first_line(stage: type) -> str:
    """A stage's docstring says in its first line what it does."""
    return (stage.__doc__ or "").strip().partition("\n")[0].rstrip(".")
