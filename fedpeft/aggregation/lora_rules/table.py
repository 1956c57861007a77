"""The rules by name, and what each asks of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from fedpeft.config.sections import RunConfig
from fedpeft.config.traits import Trait, Traits, choose_traits
from fedpeft.plugins import EntryTable, instance_of

Role = Literal["lora_A", "lora_B"] | None
"""Which factor a trained parameter is; None: neither (a classifier's head, a bias)."""

Chooses = Callable[[Role, int], bool]
"""Whether parameters of a role take part in a round, numbered from 1."""


@dataclass(frozen=True, kw_only=True)
class LoraRule:
    """One way to turn clients' factors into the next ones.

    Attributes:
        summary: one line for people.
        source: the paper.
        needs: what the PEFT method has to be.
        trained: which parameters clients train in a round; they don't touch the others.
        sent: which of these they send, and are sent; what is trained and not sent stays with its client.
        ranks: clients may train factors of ranks of their own.
        products: the next factors come from all clients' products, so every reply is held until the round
            ends and the strategy has no say in them; else they are the strategy's mean of factors.
        prunes: clients may give up ranks while they train.
        residual: what no factors of the run's rank can hold is kept in a further, frozen adapter.
    """

    summary: str
    source: str
    needs: Trait = Trait.NEEDS_BOTH_FACTORS
    trained: Chooses = lambda role, number: True
    sent: Chooses = lambda role, number: True
    ranks: bool = False
    products: bool = False
    residual: bool = False
    prunes: bool = False

    @property
    def alternates(self) -> bool:
        """Whether other parameters train in other rounds."""
        return any(self.trained(role, 1) != self.trained(role, 2) for role in ("lora_A", "lora_B"))

    @property
    def traits(self) -> Traits:
        """What it is, as `fedpeft.compatibility` asks."""
        return choose_traits(
            {
                self.needs: True,
                Trait.COMBINES_FACTORS: True,
                Trait.USES_PRODUCTS: self.products,
                Trait.ALTERNATES_FACTORS: self.alternates,
                Trait.KEEPS_PARAMETERS: self.keeps,
                Trait.KEEPS_RESIDUAL: self.residual,
                Trait.LETS_RANKS_SHRINK: self.prunes,
            }
        )

    @property
    def keeps(self) -> bool:
        """Whether clients keep parameters to themselves."""
        return not self.sent("lora_B", 1)


def _one_factor(role: Role, number: int) -> bool:
    """B in odd rounds, as A has no gradient while B is zero; A in even ones."""
    return role is None or (role == "lora_B") == (number % 2 == 1)


def _a_alone(role: Role, number: int) -> bool:
    return role == "lora_A"


_OWN: Mapping[str, LoraRule] = {
    "fedit": LoraRule(
        summary="mean of A and mean of B; their product is not the mean of products",
        source="Zhang et al. 2024, FedIT (arXiv 2305.05644)",
    ),
    "ffa": LoraRule(
        summary="A stays at its draw, mean of B: exact",
        source="Sun, Li, Li, Ding 2024, FFA-LoRA (arXiv 2403.12313)",
        needs=Trait.NEEDS_FACTOR_B,
    ),
    "rolora": LoraRule(
        summary="B in odd rounds, A in even ones: each round's mean is exact",
        source="Chen et al. 2024, RoLoRA (arXiv 2409.02346)",
        trained=_one_factor,
        sent=_one_factor,
    ),
    "fedsa": LoraRule(
        summary="mean of A; every client keeps its own B and head",
        source="Guo et al. 2024, FedSA-LoRA (arXiv 2410.01463)",
        sent=_a_alone,
    ),
    "hetlora": LoraRule(
        summary="factors of several ranks, padded by zeros, mean weighted by the norms of products",
        source="Cho et al. 2024, HetLoRA (arXiv 2401.06432)",
        ranks=True,
        products=True,
        prunes=True,
    ),
    "flexlora": LoraRule(
        summary="mean of products, cut to each client's rank by its singular values",
        source="Bai et al. 2024, FlexLoRA (arXiv 2402.11505)",
        ranks=True,
        products=True,
    ),
    "flora": LoraRule(
        summary="factors stacked: the exact sum is added to what is frozen, and clients begin afresh",
        source="Wang et al. 2024, FLoRA (arXiv 2409.05976)",
        ranks=True,
        products=True,
        residual=True,
    ),
    "exact-residual": LoraRule(
        summary="mean of A and of B, and what they miss of the mean of products is added to what is frozen",
        source="Singhal et al. 2024, FedEx-LoRA (arXiv 2410.09432)",
        ranks=True,
        products=True,
        residual=True,
    ),
}

LORA_RULES = EntryTable("lora_rules", _OWN, instance_of(LoraRule))


def rule_of(run: RunConfig) -> LoraRule | None:
    """The run's rule; None without one, or with one that there is not."""
    name = run.federation.lora_rule
    return None if name is None else LORA_RULES.get(name)
