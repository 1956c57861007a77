"""What all lossy stages share: which tensors they touch, error feedback, distortion, and the way back."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedpeft.codec import (
    DenseTensor,
    Encoded,
    compress_named,
    distortion,
    residual_after,
    tensor_stream,
    with_residual,
)
from fedpeft.codec.masks import PublicSource
from fedpeft.config.sections import unit
from fedpeft.errors import UpdateError
from fedpeft.runtime.randomness import derive_seed
from fedpeft.stages.base import Stage, StageContext
from fedpeft.updates.update import Layout, Update

Float32Array = NDArray[np.float32]
Density = Annotated[
    float,
    Field(gt=0.0, le=1.0, description="Share of each tensor's entries that is kept."),
    unit("share"),
]
Patterns = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    Field(
        description="Shell-style patterns of the tensors that are compressed; the others travel as they are."
    ),
]
ErrorFeedback = Annotated[
    bool, Field(description="Keep what was lost on the client and add it to its next update.")
]
EVERY: Patterns = ("*",)

_RESIDUAL = "residual/"


class Lossy(Protocol):
    """A stage that compresses tensors.

    Attributes:
        tensors: shell-style patterns of the names it touches; the others travel as they are.
        error_feedback: whether what was lost is kept and added to the client's next update.
    """

    kind: ClassVar[str]

    @property
    def tensors(self) -> Patterns:
        """See the class."""
        ...

    @property
    def error_feedback(self) -> bool:
        """See the class."""
        ...

    def compress(self, deltas: Mapping[str, Float32Array], context: StageContext) -> Mapping[str, Encoded]:
        """The compressed form of each tensor."""
        ...

    def check(self, name: str, tensor: Encoded, context: StageContext) -> str | None:
        """What `tensor` has that `compress` would not have given; None if nothing."""
        ...


def check_touched(stages: Sequence[Stage], layout: Layout) -> None:
    """Refuse a run whose compressor touches nothing, before anyone trains.

    Args:
        layout: of what passes the stages.

    Raises:
        UpdateError: a lossy stage's patterns match no tensor that has entries.
    """
    for stage in stages:
        patterns: Patterns | None = getattr(stage, "tensors", None) if stage.role == "lossy" else None
        if patterns is not None and not any(
            _matches(patterns, name, math.prod(shape)) for name, (shape, _) in layout.items()
        ):
            sample = ", ".join(sorted(layout)[:3]) or "none"
            raise UpdateError(
                f"stage '{stage.kind}': the compressor matches none of {len(layout)} tensors (names such as"
                f" {sample}); mend its tensors = {list(patterns)}"
            )


def compress_update(stage: Lossy, update: Update, context: StageContext) -> Update:
    """The client's hook of every lossy stage.

    Adds the metrics ``distortion`` (relative L2) and ``cosine`` of what was sent against what was to be sent:
    the update, plus the residual under error feedback. The new residual is left in the context's memory.

    Source: for error feedback, Karimireddy, Rebjock, Stich and Jaggi 2019, algorithm 2, with the update in
    place of the step.

    Raises:
        UpdateError: arrays that are not float32 or not finite, or no tensor that `stage.tensors` matches.
    """
    _check_floats(stage, update)
    touched = {name: array for name, array in update.arrays.items() if _touches(stage, name, array.size)}
    whole = dict(update.arrays)
    if stage.error_feedback:
        whole |= with_residual(touched, _residuals(context))
    encoded = compress_named(
        whole, lambda deltas: stage.compress(deltas, context), lambda name: name in touched
    )
    if stage.error_feedback:
        left = residual_after(
            {name: whole[name] for name in touched}, {name: encoded[name] for name in touched}
        )
        context.memory.update({_RESIDUAL + name: array for name, array in left.items()})
    lost = distortion(whole, {name: tensor.dense() for name, tensor in encoded.items()})
    metrics = {**update.metrics, "distortion": lost.relative_l2, "cosine": lost.cosine}
    return Update({}, update.weight, metrics, encoded)


def restore_update(stage: Lossy, update: Update, context: StageContext) -> Update:
    """The server's hook of every lossy stage: dense float32 arrays.

    Raises:
        UpdateError: a tensor that is not in the form that the run file promises.
    """
    if update.arrays or not update.encoded:
        raise UpdateError(f"{context.client}: plain arrays came, stage '{stage.kind}' sends compressed ones")
    arrays: dict[str, NDArray[Any]] = {}
    for name, tensor in update.encoded.items():
        try:
            problem = _problem(stage, name, tensor, context)
            if problem is None:
                arrays[name] = tensor.dense()
        except UpdateError as error:
            problem = str(error)
        if problem is not None:
            raise UpdateError(f"{context.client}: array {name!r} breaks stage '{stage.kind}': {problem}")
    return Update(arrays, update.weight, update.metrics)


def public_source(stage: Lossy, name: str, context: StageContext) -> PublicSource:
    """The stream of positions of one tensor of one client in one round, known to everyone."""
    seed = derive_seed(context.seed, "stages", stage.kind, context.client)
    return PublicSource(seed, context.round, tensor_stream(name))


def _problem(stage: Lossy, name: str, tensor: Any, context: StageContext) -> str | None:
    dense = isinstance(tensor, DenseTensor)
    if dense == _touches(stage, name, math.prod(tensor.shape)):
        return "it came whole and should be compressed" if dense else "it came compressed and should be whole"
    return None if dense else stage.check(name, tensor, context)


def _touches(stage: Lossy, name: str, size: int) -> bool:
    return _matches(stage.tensors, name, size)


def _matches(patterns: Patterns, name: str, size: int) -> bool:
    return size > 0 and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _check_floats(stage: Lossy, update: Update) -> None:
    for name, array in update.arrays.items():
        if array.dtype != np.float32:
            raise UpdateError(
                f"array {name!r} is {array.dtype.name}; stage '{stage.kind}' compresses float32 only"
            )


def _residuals(context: StageContext) -> Mapping[str, Float32Array]:
    return {
        key.removeprefix(_RESIDUAL): array
        for key, array in context.memory.items()
        if key.startswith(_RESIDUAL)
    }
