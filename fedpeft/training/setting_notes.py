"""Settings that are allowed and hardly meant: one line each, said before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator

from fedpeft.config.sections import RunConfig

_LARGE = {"sgd": 1e3}  # a rate at which plain gradients of any loss that is known here diverge
_LARGE_ADAPTIVE = 0.5  # of optimisers that move every weight by about the rate in a step
_SMALL = 1e-9  # a step that float32 weights of usual size don't notice
_LONGEST = 8192  # generated tokens
_SHORTEST = 8  # of a row: its special tokens and a word or two


def setting_notes(run: RunConfig) -> tuple[str, ...]:
    """Return what a person should know of a run's settings before it is trained."""
    return tuple(_notes(run))


def _notes(run: RunConfig) -> Iterator[str]:
    training, evaluation = run.training, run.evaluation
    if training.kind != "none":
        large = _LARGE.get(training.optimizer, _LARGE_ADAPTIVE)
        if training.lr >= large:
            yield (
                f"training.lr = {training.lr:g} is far above what converges with optimizer"
                f" '{training.optimizer}' (below {large:g}); the loss will not fall"
            )
        elif training.lr <= _SMALL:
            yield f"training.lr = {training.lr:g} moves no weight by as much as float32 can tell; raise it"
    if evaluation.max_new_tokens > _LONGEST:
        yield (
            f"evaluation.max_new_tokens = {evaluation.max_new_tokens:,}: a model that does not stop writes as"
            " much for each test row, which can take longer than the training; lower it"
        )
    if run.data.max_length < _SHORTEST:
        yield (
            f"data.max_length = {run.data.max_length} leaves special tokens and hardly a word of each row;"
            f" set {_SHORTEST} at least, 64 and more for sentences"
        )
