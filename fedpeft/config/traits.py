"""What entries of the tables declare of themselves: the words in which compatibility is decided.

A stage, a strategy, a LoRA rule, a PEFT method, a space, a trainer's rule or an attack says what it *is*;
`fedpeft.compatibility` says which of these can't go together, and never asks for a name. A copy of an entry
under another name declares the same, and is refused in the same runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum


class Trait(Enum):
    """One property that decides what an entry can be combined with; the value says it in a sentence."""

    # Strategies
    STEP_IS_NOT_THE_MEAN = "moves by something else than the mean of the updates"
    REMEMBERS_STEPS = "remembers earlier steps, entry by entry"
    NEEDS_EACH_UPDATE = "looks at single updates; their sum is not enough"
    COMPARES_UPDATES = "compares updates with each other, by their entries or distances"
    SCALES_BY_LOSS = "weighs updates by the clients' losses"
    PULLS_GRADIENTS = "acts on the gradients of clients while they train"
    STEPS_BY_ETA = "moves every entry by about eta, whatever the size of the updates"
    STEPS_BELOW_ONE = "moves entries by less than one, as it is set"
    WORKS_ON_PRODUCTS = "measures and combines the products of LoRA's factors"

    # LoRA rules
    COMBINES_FACTORS = "says how LoRA's factors are combined"
    USES_PRODUCTS = "makes the next factors from all clients' products"
    ALTERNATES_FACTORS = "trains other factors in other rounds"
    KEEPS_PARAMETERS = "lets clients keep parameters to themselves"
    NEEDS_BOTH_FACTORS = "is for methods that train both of LoRA's factors"
    NEEDS_FACTOR_B = "is for methods that train LoRA's B alone"
    KEEPS_RESIDUAL = "keeps what no factors of the run's rank can hold in a further adapter"
    LETS_RANKS_SHRINK = "goes on with clients that give up ranks"

    # PEFT methods and bases
    TRAINS_BOTH_FACTORS = "trains LoRA's A and B as they are"
    TRAINS_FACTOR_B = "trains LoRA's B, while A stays at its draw"
    STARTS_FROM_WEIGHTS = "starts from the base's weights"
    VARIES_RANKS = "gives modules ranks or scalings of their own"
    QUANTISED_BASE = "multiplies with quantised weights"
    EMULATED_BASE = "stands in for a model whose middle layers are elsewhere"
    OUTSIDE_LAYERS = "trains what no layer of the model holds"
    NEEDS_ROUNDED_BASE = "trains the scales of rounded integers"

    # Spaces
    SENDS_ENTRIES = "sends changes of the trained entries themselves"
    INTEGER_UPDATES = "sends exact integers"
    SEEDED_MOVES = "carries moves along seeded directions only"
    PROJECTS_CHANGES = "projects changes that a first-order trainer makes"
    ROUND_DIRECTIONS = "takes other directions in every round"
    FIXED_DIRECTIONS = "takes the same directions in all rounds"
    ONE_ROUND_SUMS = "sends what adds up with updates of the same round only"
    SPARSE_VISITS = "lets each client visit few of the directions"
    VISIT_COUNTS = "sends how often seeds were visited, and draws them by what was measured"
    DEPENDS_ON_EARLIER = "sends updates that depend on the client's earlier ones"

    # Trainers
    DENSE_MOVES = "moves by gradients, in any direction"
    DIRECTIONAL_MOVES = "trains by forward passes along directions, without gradients"
    NO_TRAINING = "trains nothing"
    NO_REPLAY = "makes steps that integers and directions alone don't rebuild"
    FORWARD_DERIVATIVES = "differentiates every product in forward mode"
    MORE_THAN_SCALARS = "uses losses or gradients beyond one scalar for a direction"
    TRAINS_BASELINES = "trains in one long run without rounds"
    DROPS_GRADIENTS = "drops each gradient before the next is there"
    SHRINKS_RANKS = "lets clients give up ranks while they train"
    CAPS_RESIDUAL = "bounds the rank of what is added to the base"

    # Stages and the way down
    LOSSY = "changes the representation and loses some of it"
    SCALES = "scales updates by real numbers"
    ERROR_FEEDBACK = "keeps what was lost for the next update"
    READS_ROWS_AGAIN = "asks the client's held-out rows about its update"
    ADDS_MASKS = "adds masks that cancel over a cohort"
    COMPRESSES_STATES = "compresses the state on its way down"

    # Federation
    SEVERAL_STARTS = "sums updates that started from several states"
    DRAWS_COHORTS = "draws who is asked in a round"
    ASKS_IN_RESERVE = "asks more clients than are needed"
    HAS_GROUPS = "has clients that differ from the rest"
    DIFFERS_IN_FORM = "holds another base, another rank or a part of the adapter"
    TRAINS_A_PART = "trains a part of the adapter"

    # Privacy
    PRIVATE = "promises differential privacy"
    RELEASES_SUMS_ONLY = "releases the noised sum of a cohort only"
    SECRET_COHORTS = "needs cohorts drawn by secret coins"
    HIDES_ROWS = "hides any one row of a client"
    NOISE_ON_DEVICE = "accounts for noise that a device adds to what it learned"
    ONE_RELEASE = "accounts for one release a round"

    # Tasks and attacks
    HAS_CLASSES = "gives every row one class"
    NEEDS_CLASSES = "takes rows with a class each"
    NEEDS_FACTORS = "is about LoRA's factors"
    HOSTILE = "makes clients hostile"
    COLLUDES = "is made from what several clients know"


Traits = frozenset[Trait]
NO_TRAITS: Traits = frozenset()


def choose_traits(holds: Mapping[Trait, bool]) -> Traits:
    """Return the traits that hold."""
    return frozenset(trait for trait, held in holds.items() if held)
