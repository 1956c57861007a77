"""The table of conflicts: every row is reached, and a copy of an entry is refused where the original is."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import pytest

from fedpeft.aggregation.lora_rules import LORA_RULES
from fedpeft.attacks import ATTACKS
from fedpeft.compatibility import CONFLICTS, conflicts_of
from fedpeft.config.run_file import build_run
from fedpeft.config.traits import Trait
from fedpeft.errors import codes_of
from fedpeft.planning.preflight import problems_of
from fedpeft.rounds.strategy_table import RULES
from fedpeft.stages import STAGES
from fedpeft.training.zeroth_rules import RULES as ZEROTH_RULES

COPY = "a-copy"
PROMISE = {"noise_multiplier": 1.0, "target_delta": 1e-5, "max_epsilon": 50.0}
PRIVACY: dict[str, dict[str, Any]] = {
    "client-level": {"kind": "client-level", "clip_norm": 0.5, **PROMISE},
    "record-level": {
        "kind": "record-level",
        "max_grad_norm": 1.0,
        "sample_rate": 0.1,
        "expected_batch_size": 8,
        **PROMISE,
    },
    "local": {"kind": "local", "clip_norm": 0.5, **PROMISE},
}
BUFFERED = {"mode": "buffered", "buffer": {"size": 2, "concurrency": 3}}
ZEROTH = {"training": {"kind": "zeroth-order", "steps": 4}}
PART = {"groups": [{"clients": ["a"], "trains": ["q_proj"]}]}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "buffered": {"federation": BUFFERED},
    "none": {"training": {"kind": "none"}},
    "projected": {"space": "projected"},
    "fedkseed": {"space": "seed-scalars", **ZEROTH},
    "common": {"space": {"kind": "seed-scalars", "mode": "common", "num_seeds": 4}, **ZEROTH},
    "fedkseed-pro": {"space": {"kind": "seed-scalars", "mode": "fedkseed-pro"}, **ZEROTH},
    "zeroth order": ZEROTH,
    "groups": PART,
    "part by directions": {"groups": [{**PART["groups"][0], "training": {"kind": "zeroth-order"}}]},
    "downlink": {"downlink": {"kind": "compeft"}},
    "baselines": {"space": "projected", "evaluation": {"baselines": True}},
    "weights": {"peft": {"method": "lora", "r": 4, "init_lora_weights": "olora"}, **PART},
    "patterns": {"peft": {"method": "lora", "r": 4, "rank_pattern": {"q_proj": 2}}},
    "projected, buffered": {"space": "projected", "federation": BUFFERED, **PART},
    "projected, down": {"space": "projected", "downlink": {"kind": "compeft"}},
    "seeds, first order": {"space": "seed-scalars"},
    "projected, zeroth order": {"space": "projected", **ZEROTH},
    "quantised": {"model": {"quantization": "rtn4"}, **ZEROTH},
    "shrinking": {"federation": {"self_pruning": {}}, "training": {"fused_update": True}},
    "residual": {"federation": {"residual_rank": 2}},
    "reserve": {
        "federation": {**BUFFERED, "over_selection": 0.5, "sampling": {"kind": "fixed", "cohort": 2}}
    },
    "hostile": {"federation": {"self_pruning": {}, "attack": {"kind": "alie", "fraction": 0.5}}, **PART},
    "none, record-level": {"training": {"kind": "none"}, "privacy": PRIVACY["record-level"], **PART},
    "group, down": {"downlink": {"kind": "compeft"}, **PART},
    "group, client-level": {"privacy": PRIVACY["client-level"], **PART},
    "counts, private": {
        "space": {"kind": "seed-scalars", "mode": "fedkseed-pro"},
        "privacy": PRIVACY["local"],
        **ZEROTH,
    },
    **{kind: {"privacy": section} for kind, section in PRIVACY.items()},
    **{f"{kind}, buffered": {"privacy": PRIVACY[kind], "federation": BUFFERED} for kind in PRIVACY},
    **{
        f"shrinking, {kind}": {"privacy": PRIVACY[kind], "federation": {"self_pruning": {}}}
        for kind in PRIVACY
    },
    **{rule: {"federation": {"lora_rule": rule}} for rule in LORA_RULES},
}
NEEDED: dict[str, dict[str, Any]] = {
    "krum": {"num_malicious_nodes": 0},
    "multikrum": {"num_malicious_nodes": 0, "num_nodes_to_select": 1},
    "bulyan": {"num_malicious_nodes": 0},
    "fedprox": {"proximal_mu": 0.1},
    "clip": {"clip_norm": 1.0},
    "quantise": {"bits": 8},
}


def chosen(table: str, name: str, like: str) -> dict[str, Any]:
    """Sections that choose one entry of a table; `like` is the entry whose options it needs."""
    section: dict[str, Any] = {"kind": name, **NEEDED.get(like, {})}
    sections: dict[str, dict[str, Any]] = {
        "strategy": {"federation": {"strategy": section}},
        "lora rule": {"federation": {"lora_rule": name}, "peft": {"method": "lora", "r": 4}},
        "stage": {"stages": [section]},
        "attack": {"federation": {"attack": {**section, "fraction": 0.5}}},
        "rule": {"training": {"kind": "zeroth-order", "steps": 4, "rule": name}},
    }
    return sections[table]


def merged(*parts: dict[str, Any]) -> dict[str, Any]:
    tables: dict[str, Any] = {"run": {"name": "r", "rounds": 2}}
    for part in parts:
        for key, value in copy.deepcopy(part).items():
            both = isinstance(value, dict) and isinstance(tables.get(key), dict)
            tables[key] = {**tables[key], **value} if both else value
    if "privacy" in tables:
        tables["federation"] = {"weighting": "uniform", **tables.get("federation", {})}
    return tables


@contextmanager
def registered(table: MutableMapping[str, Any], name: str) -> Iterator[None]:
    """A copy of an entry under another name."""
    entry = table[name]
    table[COPY] = type("Copy", (entry,), {"kind": COPY}) if isinstance(entry, type) else entry
    try:
        yield
    finally:
        del table[COPY]


TABLES: dict[str, Any] = {
    "strategy": RULES,
    "lora rule": LORA_RULES,
    "stage": STAGES,
    "attack": ATTACKS,
    "rule": ZEROTH_RULES,
}
ENTRIES = [(table, name) for table, entries in TABLES.items() for name in entries]


@pytest.mark.parametrize(("table", "name"), ENTRIES)
def test_a_copy_under_another_name_is_refused_where_the_original_is(table: str, name: str) -> None:
    """Only its own name differs, in which conflicts there are and in what they say."""
    with registered(TABLES[table], name):
        for setting, part in SETTINGS.items():
            original = conflicts_of(build_run(merged(part, chosen(table, name, name)), source="x"))
            copied = conflicts_of(build_run(merged(part, chosen(table, COPY, name)), source="x"))
            assert codes_of(original) == codes_of(copied), setting
            assert len(original) == len(copied)


def strategies(code: str, **tables: Any) -> set[str]:
    """Strategies that a row refuses in a run."""
    return {
        name
        for name in RULES
        if code
        in codes_of(problems_of(build_run(merged(tables, chosen("strategy", name, name)), source="x")))
    }


def test_which_strategies_are_refused_where() -> None:
    """Written out, so that a strategy that declares too little shows."""
    single = {"krum", "multikrum", "bulyan", "fedmedian", "fedtrimmedavg", "norm-bound", "geometric-median"}
    moving = {*single, "fedavgm", "fedadam", "fedyogi", "fedadagrad", "qfedavg"}
    adaptive = {"fedadam", "fedyogi", "fedadagrad"}
    assert strategies("strategy-needs-each-buffered", federation=BUFFERED) == {*single, "qfedavg"}
    assert strategies("strategy-needs-each-private", privacy=PRIVACY["client-level"]) == {*single, "qfedavg"}
    assert strategies("strategy-losses-private", privacy=PRIVACY["local"]) == {"qfedavg"}
    assert strategies("strategy-compares-sparse", **SETTINGS["fedkseed"]) == single - {"norm-bound"}
    assert strategies("strategy-steps-below-quantum", **SETTINGS["fedkseed"]) == adaptive
    assert strategies("strategy-remembers-directions", **SETTINGS["common"]) == {*adaptive, "fedavgm"}
    assert strategies("strategy-moves-counts", **SETTINGS["fedkseed-pro"]) == moving
    assert strategies("strategy-factors", **SETTINGS["flora"]) == moving
    assert strategies("strategy-moves-resting", **SETTINGS["rolora"]) == {*adaptive, "fedavgm"}
    assert strategies("group-part-strategy", **PART) == moving
    assert strategies("strategy-pulls-gradients", **ZEROTH) == {"fedprox"}


UNREACHED = {
    "stage-masks-buffered",  # no stage adds masks yet
    "emulator-outside",  # with a base that is one: tests/simulation/test_offsite_runs.py
    "emulator-needs",
}


def test_every_row_is_reached_and_has_its_own_code() -> None:
    codes = [row.code for row in CONFLICTS]
    assert len(set(codes)) == len(codes)
    assert all(row.other is None or row.lacks is None for row in CONFLICTS)
    entries = [chosen(table, name, name) for table, name in ENTRIES]
    entries += [
        {"stages": [{"kind": "compeft", "alpha": "search"}]},
        {"stages": [{"kind": "compeft", "error_feedback": True}]},
        {"peft": {"method": "ffa-lora"}, "federation": {"lora_rule": "fedit"}},
    ]
    found: set[str] = set()
    for part, entry in itertools.product(SETTINGS.values(), entries):
        found |= set(codes_of(conflicts_of(build_run(merged(part, entry), source="x"))))
    assert set(codes) - found == UNREACHED


def test_every_trait_decides_something() -> None:
    """A trait that no row names, and nothing else asks for, would promise what it doesn't do."""
    asked = {trait for row in CONFLICTS for trait in (*row.has, row.other, row.lacks)}
    assert set(Trait) - asked == {Trait.STEPS_BY_ETA}  # from which STEPS_BELOW_ONE follows


def test_lines_name_the_key_the_reason_and_the_way_out() -> None:
    run = build_run(merged(SETTINGS["buffered"], chosen("strategy", "fedmedian", "fedmedian")), source="x")
    (line,) = conflicts_of(run)
    assert line == (
        "federation.strategy: fedmedian compares updates of one round, and in federation.mode 'buffered' they"
        " start from different states, so that honest ones are far apart; use fedavg or another rule of the"
        " mean"
    )
    assert line.code == "strategy-needs-each-buffered"
