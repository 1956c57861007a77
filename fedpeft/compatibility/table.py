"""The table of conflicts. Each row: who is refused, what it meets or lacks, why, and what to do instead."""

from __future__ import annotations

from fedpeft.compatibility.conflict import Conflict
from fedpeft.config.traits import Trait

_BUFFERED = "federation.mode 'buffered'"

_STRATEGIES = (
    Conflict(
        code="strategy-pulls-gradients",
        has=(Trait.PULLS_GRADIENTS,),
        other=Trait.DIRECTIONAL_MOVES,
        reason="{name} pulls on gradients, and a zeroth-order trainer has none",
        advice="use fedavg",
    ),
    Conflict(
        code="strategy-scales-integers",
        has=(Trait.SCALES_BY_LOSS,),
        other=Trait.INTEGER_UPDATES,
        reason="{name} scales updates by losses, which takes them off the integers",
        advice="use fedavg",
    ),
    Conflict(
        code="strategy-compares-sparse",
        has=(Trait.COMPARES_UPDATES,),
        other=Trait.SPARSE_VISITS,
        reason="{name} compares clients' scalars, but with space '{other}' as it is set most directions are"
        " visited by one client or none",
        advice="set space.mode 'common', or direction_sets = 1 of space 'projected'",
    ),
    Conflict(
        code="strategy-moves-counts",
        has=(Trait.STEP_IS_NOT_THE_MEAN,),
        other=Trait.VISIT_COUNTS,
        reason="{name} would act on {other}'s visit counts as if they were scalars",
        advice="use fedavg",
    ),
    Conflict(
        code="strategy-remembers-directions",
        has=(Trait.REMEMBERS_STEPS,),
        other=Trait.ROUND_DIRECTIONS,
        reason="{name} remembers earlier rounds by position, but a position is another direction in every"
        " round here",
        advice="use fedavg, or space 'seed-scalars' with mode 'fedkseed'",
    ),
    Conflict(
        code="strategy-steps-below-quantum",
        has=(Trait.STEPS_BELOW_ONE,),
        other=Trait.FIXED_DIRECTIONS,
        key=".eta",
        reason="in seed space {name} moves scalars by about eta quanta, and less than 1 rounds to nothing",
        advice="give eta = 32, say, and tau in quanta too",
    ),
    Conflict(
        code="strategy-needs-each-private",
        has=(Trait.NEEDS_EACH_UPDATE,),
        other=Trait.RELEASES_SUMS_ONLY,
        reason="{name} looks at single updates, and under client-level privacy only their noised sum is"
        " released",
        advice="use fedavg or another rule of the mean",
    ),
    Conflict(
        code="strategy-losses-private",
        has=(Trait.SCALES_BY_LOSS,),
        other=Trait.PRIVATE,
        reason="{name} weighs by the clients' losses, which are private",
        advice="use fedavg",
    ),
    Conflict(
        code="strategy-needs-each-buffered",
        has=(Trait.NEEDS_EACH_UPDATE,),
        other=Trait.SEVERAL_STARTS,
        reason="{name} compares updates of one round, and in "
        + _BUFFERED
        + " they start from different states, so that honest ones are far apart",
        advice="use fedavg or another rule of the mean",
    ),
    Conflict(
        code="strategy-factors",
        has=(Trait.STEP_IS_NOT_THE_MEAN,),
        other=Trait.USES_PRODUCTS,
        reason="lora_rule '{other}' makes the next factors from products, and {name} from the factors'"
        " entries",
        advice="use fedavg or fedprox, or lora_rule 'fedit'",
    ),
    Conflict(
        code="strategy-moves-resting",
        has=(Trait.REMEMBERS_STEPS,),
        other=Trait.ALTERNATES_FACTORS,
        reason="{name} remembers a step for each entry, and would move the factor that rests under '{other}'",
        advice="use fedavg or fedprox",
    ),
    Conflict(
        code="strategy-products",
        has=(Trait.WORKS_ON_PRODUCTS,),
        other=Trait.COMBINES_FACTORS,
        key=".geometry",
        reason="{name} works on products here, and lora_rule '{other}' says how factors are combined",
        advice="remove lora_rule, or set geometry 'entries'",
    ),
)

_LORA_RULES = (
    Conflict(
        code="lora-rule-both-factors",
        has=(Trait.NEEDS_BOTH_FACTORS,),
        lacks=Trait.TRAINS_BOTH_FACTORS,
        reason="'{name}' is for peft.method {those}, and '{method}' came",
        advice="use one of these",
    ),
    Conflict(
        code="lora-rule-factor-b",
        has=(Trait.NEEDS_FACTOR_B,),
        lacks=Trait.TRAINS_FACTOR_B,
        reason="'{name}' is for peft.method {those}, and '{method}' came",
        advice="use it",
    ),
    Conflict(
        code="lora-rule-space",
        has=(Trait.COMBINES_FACTORS,),
        lacks=Trait.SENDS_ENTRIES,
        reason="'{name}' averages factors, and space '{space}' sends scalars along directions",
        advice="use space 'adapter-delta'",
    ),
    Conflict(
        code="lora-rule-patterns",
        has=(Trait.VARIES_RANKS,),
        other=Trait.USES_PRODUCTS,
        reason="'{other}' takes one rank and one scaling for all modules",
        advice="remove it",
    ),
    Conflict(
        code="lora-rule-start",
        has=(Trait.STARTS_FROM_WEIGHTS,),
        other=Trait.USES_PRODUCTS,
        reason="'{other}' makes new factors each round, which would undo a start of '{name}'",
        advice="remove it",
    ),
    *(
        Conflict(
            code=f"lora-rule-directions-{trait.name.split('_')[0].lower()}",
            has=(trait,),
            other=Trait.DIRECTIONAL_MOVES,
            reason="'{name}' treats A and B apart, and zeroth-order directions cover both",
            advice="for training.kind use 'first-order'",
        )
        for trait in (Trait.ALTERNATES_FACTORS, Trait.KEEPS_PARAMETERS)
    ),
    Conflict(
        code="lora-rule-products-private",
        has=(Trait.USES_PRODUCTS,),
        other=Trait.RELEASES_SUMS_ONLY,
        reason="'{name}' needs each client's product, and client-level privacy releases a noised sum only",
        advice="use 'ffa', 'rolora' or 'fedit'",
    ),
    Conflict(
        code="lora-rule-alternates-private",
        has=(Trait.ALTERNATES_FACTORS,),
        other=Trait.HIDES_ROWS,
        reason="'{name}' is not proven for record-level privacy",
        advice="use 'ffa' or 'fedit'",
    ),
    Conflict(
        code="lora-rule-keeps-private",
        has=(Trait.KEEPS_PARAMETERS,),
        other=Trait.PRIVATE,
        reason="'{name}' lets clients keep parameters that no noise was added to",
        advice="use 'ffa'",
    ),
    Conflict(
        code="lora-rule-buffered",
        has=(Trait.COMBINES_FACTORS,),
        other=Trait.SEVERAL_STARTS,
        reason="'{name}' combines LoRA's factors with those of the state that all updates of a round started"
        " from, and in " + _BUFFERED + " they started from several",
        advice="remove it, or use mode 'synchronous'",
    ),
    *(
        Conflict(
            code=f"downlink-{trait.name.split('_')[0].lower()}-factors",
            has=(Trait.COMPRESSES_STATES,),
            other=trait,
            reason="under lora_rule '{other}' a round's step is no change of one set of entries, which is"
            " what it compresses",
            advice="remove [downlink]",
        )
        for trait in (Trait.USES_PRODUCTS, Trait.KEEPS_PARAMETERS, Trait.ALTERNATES_FACTORS)
    ),
    Conflict(
        code="residual-rank-idle",
        has=(Trait.CAPS_RESIDUAL,),
        lacks=Trait.KEEPS_RESIDUAL,
        reason="belongs to lora_rule {those}",
        advice="remove it",
    ),
    Conflict(
        code="pruning-idle",
        has=(Trait.SHRINKS_RANKS,),
        lacks=Trait.LETS_RANKS_SHRINK,
        reason="belongs to lora_rule {those}",
        advice="remove it, or set that rule",
    ),
    Conflict(
        code="pruning-trainer",
        has=(Trait.SHRINKS_RANKS,),
        lacks=Trait.DENSE_MOVES,
        reason="only training.kind 'first-order' can shrink ranks",
        advice="remove it",
    ),
    Conflict(
        code="pruning-fused",
        has=(Trait.DROPS_GRADIENTS,),
        other=Trait.SHRINKS_RANKS,
        reason="the penalty of self_pruning needs all gradients",
        advice="remove one of the two",
    ),
    Conflict(
        code="pruning-private",
        has=(Trait.SHRINKS_RANKS,),
        other=Trait.PRIVATE,
        reason="which ranks a client gives up tells about its rows, and no noise hides it",
        advice="remove it",
    ),
    Conflict(
        code="pruning-attack",
        has=(Trait.SHRINKS_RANKS,),
        other=Trait.HOSTILE,
        reason="hostile clients remember no ranks",
        advice="remove it, or the attack",
    ),
)

_TRAINERS_AND_SPACES = (
    Conflict(
        code="space-first-order",
        has=(Trait.SEEDED_MOVES,),
        other=Trait.DENSE_MOVES,
        reason="{space} carries moves along seeded directions, and a {other} trainer makes others",
        advice="set training.kind 'zeroth-order' or space 'adapter-delta'",
    ),
    Conflict(
        code="space-zeroth-order",
        has=(Trait.PROJECTS_CHANGES,),
        other=Trait.DIRECTIONAL_MOVES,
        reason="{space} projects changes that a first-order trainer makes; a zeroth-order trainer's own"
        " scalars are exact in another space",
        advice="use space 'seed-scalars'",
    ),
    Conflict(
        code="rule-no-replay",
        has=(Trait.NO_REPLAY,),
        other=Trait.SEEDED_MOVES,
        reason="{name} {why} and can't be replayed from scalars",
        advice="use space 'adapter-delta' or one of {alternatives}",
    ),
    Conflict(
        code="baselines-directions",
        has=(Trait.TRAINS_BASELINES,),
        other=Trait.ROUND_DIRECTIONS,
        reason="clients alone and pooled data would be squeezed into one round's directions, which is no fair"
        " comparison",
        advice="run them with space 'adapter-delta'",
    ),
    Conflict(
        code="space-buffered",
        has=(Trait.ONE_ROUND_SUMS,),
        other=Trait.SEVERAL_STARTS,
        reason="coefficients of '{name}' belong to the directions of one round, and "
        + _BUFFERED
        + " sums updates of several",
        advice="use 'seed-scalars' (any mode) or 'adapter-delta'",
    ),
    Conflict(
        code="space-counts-private",
        has=(Trait.VISIT_COUNTS,),
        other=Trait.ONE_RELEASE,
        key=".mode",
        reason="'{name}' draws seeds by what clients measured, a further release",
        advice="use 'common' or 'fedkseed'",
    ),
    Conflict(
        code="base-forward-derivatives",
        has=(Trait.QUANTISED_BASE,),
        other=Trait.FORWARD_DERIVATIVES,
        reason="{other} differentiates every product, and those on {name} weights have no forward-mode"
        " derivative",
        advice="use rule 'zo-sgd'",
    ),
    Conflict(
        code="rule-beyond-scalars-private",
        has=(Trait.MORE_THAN_SCALARS,),
        other=Trait.HIDES_ROWS,
        reason="'{name}' uses losses or gradients beyond the noised scalars",
        advice="under record-level privacy choose one of {alternatives}",
    ),
    Conflict(
        code="training-none-private",
        has=(Trait.NO_TRAINING,),
        other=Trait.HIDES_ROWS,
        reason="'{name}' has no records to protect",
        advice="use 'first-order' or 'zeroth-order'",
    ),
    *(
        Conflict(
            code=f"emulator-{trait.name.split('_')[0].lower()}",
            has=(trait,),
            other=Trait.EMULATED_BASE,
            reason="what {name} trains on an emulator has no place in the full model",
            advice="use lora, or full for the outer layers' own weights",
        )
        for trait in (Trait.OUTSIDE_LAYERS, Trait.NEEDS_ROUNDED_BASE)
    ),
)

_STAGES = (
    Conflict(
        code="stage-lossy-integers",
        has=(Trait.LOSSY,),
        other=Trait.INTEGER_UPDATES,
        reason="updates of space '{space}' are exact integers, which a lossy stage would change",
        advice="remove the stage or use space 'adapter-delta'",
    ),
    Conflict(
        code="stage-scales-integers",
        has=(Trait.SCALES,),
        other=Trait.INTEGER_UPDATES,
        reason="scaling takes scalars off the integers",
        advice="bound steps with training.max_scalar or max_grad_norm",
    ),
    Conflict(
        code="downlink-integers",
        has=(Trait.COMPRESSES_STATES,),
        other=Trait.INTEGER_UPDATES,
        reason="states of space '{space}' are exact integers, which a lossy stage would change",
        advice="remove [downlink] or use space 'adapter-delta'",
    ),
    Conflict(
        code="stage-masks-buffered",
        has=(Trait.ADDS_MASKS,),
        other=Trait.SEVERAL_STARTS,
        reason="masks cancel over a cohort that starts together, which " + _BUFFERED + " has not",
        advice="remove the stage, or use mode 'synchronous'",
    ),
    Conflict(
        code="stage-feedback-buffered",
        has=(Trait.ERROR_FEEDBACK,),
        other=Trait.SEVERAL_STARTS,
        reason="error feedback counts on every update being used, and "
        + _BUFFERED
        + " gives old ones up and weighs others down",
        advice="set error_feedback = false",
    ),
    Conflict(
        code="stage-feedback-private",
        has=(Trait.ERROR_FEEDBACK,),
        other=Trait.HIDES_ROWS,
        reason="with error feedback memory on the client couples rounds that are accounted for one by one",
        advice="set error_feedback = false",
    ),
    Conflict(
        code="stage-rows-private",
        has=(Trait.READS_ROWS_AGAIN,),
        other=Trait.NOISE_ON_DEVICE,
        reason="it asks the client's rows again, beside the noise that is accounted for",
        advice="use stage 'ternary'",
    ),
)

_FEDERATION = (
    Conflict(
        code="sampling-buffered",
        has=(Trait.DRAWS_COHORTS,),
        other=Trait.SEVERAL_STARTS,
        reason=_BUFFERED + " draws no cohorts; federation.buffer.concurrency says how many work at a time",
        advice="remove it",
    ),
    Conflict(
        code="over-selection-buffered",
        has=(Trait.ASKS_IN_RESERVE,),
        other=Trait.SEVERAL_STARTS,
        reason=_BUFFERED + " waits for nobody, so there is nobody to ask in reserve",
        advice="remove it",
    ),
    Conflict(
        code="privacy-buffered",
        has=(Trait.SECRET_COHORTS,),
        other=Trait.SEVERAL_STARTS,
        reason="client-level noise is made for secret cohorts drawn by coins, and in "
        + _BUFFERED
        + " who is in a buffer follows from how quick everyone is, which others may know",
        advice="use mode 'synchronous', or kind 'local' or 'record-level'",
    ),
    Conflict(
        code="attack-classes",
        has=(Trait.NEEDS_CLASSES,),
        lacks=Trait.HAS_CLASSES,
        reason="{name} takes rows with a class each, and model.task is '{task}'",
        advice="choose another attack",
    ),
    Conflict(
        code="attack-factors",
        has=(Trait.NEEDS_FACTORS,),
        lacks=Trait.SENDS_ENTRIES,
        reason="{name} is about LoRA's factors, and space '{space}' has none",
        advice="choose another attack",
    ),
    Conflict(
        code="attack-earlier",
        has=(Trait.COLLUDES,),
        other=Trait.DEPENDS_ON_EARLIER,
        reason="{name} takes honest updates that depend on one round only, and those of space '{space}'"
        " depend on earlier ones",
        advice="choose another attack",
    ),
    Conflict(
        code="attack-groups",
        has=(Trait.COLLUDES,),
        other=Trait.HAS_GROUPS,
        reason="{name} averages its clients' updates, and groups make them differ",
        advice="remove groups",
    ),
)

_GROUPS = (
    Conflict(
        code="groups-private",
        has=(Trait.HAS_GROUPS,),
        other=Trait.HIDES_ROWS,
        reason="under record-level privacy all clients' steps are accounted for alike, as [training] says"
        " them",
        advice="remove groups, or use privacy.kind 'client-level'",
    ),
    Conflict(
        code="group-space",
        has=(Trait.DIFFERS_IN_FORM,),
        lacks=Trait.SENDS_ENTRIES,
        reason="models of several kinds have no common directions, which space '{space}' needs",
        advice="use space 'adapter-delta'",
    ),
    Conflict(
        code="group-downlink",
        has=(Trait.DIFFERS_IN_FORM,),
        other=Trait.COMPRESSES_STATES,
        reason="with [downlink] all hold the same state and base",
        advice="remove one of the two",
    ),
    Conflict(
        code="group-buffered",
        has=(Trait.DIFFERS_IN_FORM,),
        other=Trait.SEVERAL_STARTS,
        reason="clients that hold another base, another rank or a part of the adapter are sent the state of"
        " the round alone, and " + _BUFFERED + " sends older ones after a restart",
        advice="remove {name}",
    ),
    Conflict(
        code="group-attack",
        has=(Trait.DIFFERS_IN_FORM,),
        other=Trait.HOSTILE,
        reason="attacks are made for updates of one form",
        advice="let all hold the same, or none attack",
    ),
    Conflict(
        code="group-start",
        has=(Trait.DIFFERS_IN_FORM,),
        other=Trait.STARTS_FROM_WEIGHTS,
        reason="factors that start from the base's weights differ with it",
        advice="remove init_lora_weights, or the group's {name}",
    ),
    Conflict(
        code="group-part-strategy",
        has=(Trait.TRAINS_A_PART,),
        other=Trait.STEP_IS_NOT_THE_MEAN,
        reason="means are over those who train a parameter, and {other} takes whole updates",
        advice="use fedavg",
    ),
    Conflict(
        code="group-part-private",
        has=(Trait.TRAINS_A_PART,),
        other=Trait.RELEASES_SUMS_ONLY,
        reason="who trains what would divide the noised sum",
        advice="let all clients train everything",
    ),
    Conflict(
        code="group-part-directions",
        has=(Trait.TRAINS_A_PART, Trait.DIRECTIONAL_MOVES),
        reason="zeroth-order directions cover everything that the method trains",
        advice="use 'first-order'",
    ),
)

CONFLICTS: tuple[Conflict, ...] = (
    *_STRATEGIES,
    *_LORA_RULES,
    *_TRAINERS_AND_SPACES,
    *_STAGES,
    *_FEDERATION,
    *_GROUPS,
)
"""Every row; codes are unique."""
