"""Which counter and key belong to which coordinate: the contract that every backend keeps.

    key     = (direction index, low half of the run seed)
    counter = (block, high half of the run seed, tensor id, purpose * 2^24 + step)

Every field has its own bits, so two different (seed, direction, tensor, purpose, step, block) never meet in
the same (counter, key): no hash, hence no collision. Philox is a bijection of the counter under each key.
One block is 128 coordinates of one tensor in row-major order: coordinate i takes bit (i mod 32) of output
word ((i >> 5) & 3) of block i >> 7, and a set bit is +1, a cleared one -1.

Tensor ids are ranks among the sorted canonical names of the trainable set: enumeration order never matters,
and a tied weight, which has several names, counts once under the smallest.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

from fedpeft.errors import ModelError, TrainingError
from fedpeft.seedspace.support import Support

BLOCK = 128
MAX_SEED = 2**64 - 1
MAX_INT32 = 2**31 - 1  # of the sums of a state, which take four bytes per weight
MAX_STEP = 2**24 - 1
MAX_DIRECTION = 2**32 - 1
MAX_TENSOR_ID = 2**32 - 1
MAX_COORDINATES = BLOCK * 2**32
LOW_32 = 0xFFFFFFFF


class Purpose(IntEnum):
    """What random bits are for: the same seed never serves two purposes with the same bits."""

    PERTURB = 0
    MASK = 1
    ROUNDING = 2
    HADAMARD_SIGNS = 3
    HADAMARD_ROWS = 4
    CHOICE = 5


@dataclass(frozen=True, slots=True)
class CounterStream:
    """The part of the counter and key that one run, purpose and step share.

    `seed` is the run's, 64 bits. `step` is for purposes that need fresh bits as time goes by; directions
    that are addressed by their index alone keep it at 0. `support` is what directions move; None: everything.

    Raises: TrainingError when a field does not fit its bits.
    """

    seed: int
    purpose: Purpose = Purpose.PERTURB
    step: int = 0
    support: Support | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= MAX_SEED:
            raise TrainingError(f"seed {self.seed} does not fit 64 unsigned bits: choose 0 <= seed < 2^64")
        if not 0 <= self.step <= MAX_STEP:
            raise TrainingError(
                f"step {self.step} does not fit 24 bits: start a new seed after {MAX_STEP} steps"
            )

    def counter_words(self, tensor_id: int) -> tuple[int, int, int]:
        """Counter words 1, 2 and 3; word 0 is the block."""
        return self.seed >> 32, tensor_id, self.purpose << 24 | self.step

    @property
    def key_word(self) -> int:
        """Key word 1; word 0 is the direction's index."""
        return self.seed & LOW_32


@dataclass(frozen=True, slots=True)
class Span:
    """Coordinates [start, stop) of one tensor, counted in row-major order.

    Raises: TrainingError when the range is not one, or exceeds what the counter addresses.
    """

    tensor_id: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.tensor_id <= MAX_TENSOR_ID:
            raise TrainingError(f"tensor id {self.tensor_id} does not fit 32 bits: number tensors from 0")
        if not 0 <= self.start <= self.stop <= MAX_COORDINATES:
            raise TrainingError(
                f"coordinates [{self.start}, {self.stop}) are no range within one tensor: "
                f"need 0 <= start <= stop <= {MAX_COORDINATES}"
            )

    @property
    def size(self) -> int:
        """How many coordinates."""
        return self.stop - self.start

    @property
    def first_block(self) -> int:
        """The block that holds `start`."""
        return self.start // BLOCK

    @property
    def num_blocks(self) -> int:
        """How many blocks the range touches."""
        return -(-self.stop // BLOCK) - self.first_block if self.size else 0

    @property
    def offset(self) -> int:
        """Where `start` lies within the first block."""
        return self.start % BLOCK


def tensor_ids(names: Iterable[str]) -> dict[str, int]:
    """Rank of each canonical name in code-point order.

    Raises: ModelError when a name comes twice.
    """
    ordered = sorted(names)
    for earlier, later in pairwise(ordered):
        if earlier == later:
            raise ModelError(
                f"tensor name {later!r} comes twice: give each trainable tensor one canonical name"
            )
    return {name: rank for rank, name in enumerate(ordered)}


def canonical_names(aliases: Mapping[str, int]) -> dict[str, str]:
    """Maps every name to its canonical one: the smallest among the names of the same object.

    `aliases` maps a name to the identity of what it names (as `id(parameter)`); tied weights share one.
    """
    smallest: dict[int, str] = {}
    for name in sorted(aliases):
        smallest.setdefault(aliases[name], name)
    return {name: smallest[identity] for name, identity in aliases.items()}
