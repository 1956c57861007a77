"""Which rules go with what; every refusal names its reason and a way out."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fedpeft.aggregation.lora_rules import LORA_RULES
from fedpeft.config.run_file import build_run
from fedpeft.planning.preflight import problems_of

CLIENT_LEVEL = {
    "kind": "client-level",
    "clip_norm": 1.0,
    "noise_multiplier": 2.0,
    "target_delta": 1e-5,
    "max_epsilon": 100.0,
}
LOCAL = {**CLIENT_LEVEL, "kind": "local", "noise_multiplier": 5.0}
POISSON = {"kind": "poisson", "rate": 0.5}


def problems(rule: str | None, **sections: Any) -> list[str]:
    tables: dict[str, Any] = {
        "run": {"name": "x", "rounds": 1},
        "peft": {"method": "ffa-lora" if rule == "ffa" else "lora", "r": 4},
    }
    for name, section in sections.items():
        tables[name] = {**tables.get(name, {}), **section} if isinstance(section, dict) else section
    if rule is not None:
        tables.setdefault("federation", {})["lora_rule"] = rule
    return problems_of(build_run(tables, source="test"))


def test_every_rule_goes_by_itself_and_with_stages() -> None:
    for rule in LORA_RULES:
        assert problems(rule) == []
        assert problems(rule, stages=[{"kind": "ternary", "density": 0.1}]) == []
        assert problems(rule, federation={"strategy": {"kind": "fedprox", "proximal_mu": 0.1}}) == []


GROUP = {"clients": ["a"]}
RANKS = [{**GROUP, "peft": {"r": 2}}]


@pytest.mark.parametrize(
    ("rule", "sections", "words"),
    [
        ("fedlora", {}, "federation.lora_rule: unknown kind 'fedlora'"),
        ("fedit", {"peft": {"method": "vera"}}, "is for peft.method 'lora' or 'rslora', and 'vera' came"),
        ("ffa", {"peft": {"method": "lora"}}, "is for peft.method 'ffa-lora'"),
        (
            "flora",
            {"space": "seed-scalars", "training": {"kind": "zeroth-order"}},
            "use space 'adapter-delta'",
        ),
        ("flexlora", {"federation": {"strategy": "fedadam"}}, "fedadam from the factors' entries"),
        ("hetlora", {"federation": {"strategy": "fedmedian"}}, "fedmedian from the factors' entries"),
        ("rolora", {"federation": {"strategy": "fedadam"}}, "would move the factor that rests"),
        ("rolora", {"training": {"kind": "zeroth-order"}}, "use 'first-order'"),
        ("fedsa", {"training": {"kind": "zeroth-order"}}, "use 'first-order'"),
        (
            "flora",
            {"privacy": CLIENT_LEVEL, "federation": {"sampling": POISSON, "weighting": "uniform"}},
            "releases a noised sum only",
        ),
        ("fedsa", {"privacy": LOCAL, "federation": {"weighting": "uniform"}}, "that no noise was added to"),
        ("flexlora", {"downlink": {"kind": "ternary"}}, "remove .downlink."),
        (
            "flora",
            {"federation": {"mode": "buffered", "buffer": {"size": 2, "concurrency": 2}}},
            "use mode 'synchronous'",
        ),
        (
            "fedit",
            {"federation": {"residual_rank": 8}},
            "residual_rank: belongs to lora_rule .flora. or .exact-residual",
        ),
        ("flora", {"peft": {"rank_pattern": {"q_proj": 2}}}, "peft.rank_pattern: 'flora' takes one rank"),
        ("fedit", {"groups": RANKS}, "groups.0.peft: ranks and scalings differ"),
        (
            None,
            {"groups": RANKS},
            "set federation.lora_rule to one of hetlora, flexlora, flora, exact-residual",
        ),
        (
            "flora",
            {"groups": [{**GROUP, "peft": {"r": 5}}]},
            "groups.0.peft.r: 5 came and the run's adapter has 4",
        ),
        (
            "flora",
            {"groups": [{**GROUP, "peft": {"bias": "all"}}]},
            "groups.0.peft.bias: clients of one run share",
        ),
        (
            "flora",
            {"groups": [{**GROUP, "model": {"path": "x"}}]},
            "groups.0.model.path: clients of one run share",
        ),
        (None, {"groups": RANKS, "space": "projected"}, "no common directions"),
        (
            None,
            {"groups": [{**GROUP, "trains": ["q_proj"]}], "federation": {"strategy": "fedavgm"}},
            "fedavgm takes whole updates",
        ),
        (
            None,
            {
                "groups": [{**GROUP, "model": {"quantization": "nf4"}}],
                "peft": {"init_lora_weights": "loftq"},
                "model": {"quantization": "rtn4"},
            },
            "factors that start from the base's weights differ",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(
    rule: str | None, sections: dict[str, Any], words: str
) -> None:
    found = problems(rule, **sections)
    assert any(re.search(words, problem) for problem in found), found


def test_rules_of_the_mean_go_with_client_level_privacy() -> None:
    for rule in ("fedit", "ffa", "rolora"):
        sections = {"privacy": CLIENT_LEVEL, "federation": {"sampling": POISSON, "weighting": "uniform"}}
        assert not [line for line in problems(rule, **sections) if "lora_rule" in line]


def test_a_group_that_quantises_needs_no_rule() -> None:
    groups = [{**GROUP, "model": {"quantization": "nf4"}}]
    assert problems(None, groups=groups) == []
    nested = problems(None, groups=groups, model={"quantization": "rtn4", "group_size": 64})
    assert nested == []  # keys of another quantisation are not inherited
    odd = problems("fedit", groups=groups, peft={"method": "lora", "use_dora": False})
    assert odd == []
