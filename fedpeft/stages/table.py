"""The stages by name."""

from __future__ import annotations

from typing import Any

from fedpeft.config.option_tables import build_option
from fedpeft.config.sections import ClientLevelPrivacy, LocalPrivacy, RunConfig, StageSection
from fedpeft.errors import RunFileError
from fedpeft.plugins import EntryTable, offers
from fedpeft.stages.alpha_search import SEARCH
from fedpeft.stages.base import Role, Stage
from fedpeft.stages.bound import Bound
from fedpeft.stages.clip import Clip
from fedpeft.stages.compeft import Compeft
from fedpeft.stages.composition import composition_problems
from fedpeft.stages.dare import Dare
from fedpeft.stages.identity import IdentityStage
from fedpeft.stages.noise import Noise
from fedpeft.stages.quantise import Quantise
from fedpeft.stages.random_k import RandomK
from fedpeft.stages.sign import Sign
from fedpeft.stages.ternary import Ternary
from fedpeft.stages.top_k import TopK
from fedpeft.stages.weigh import Weigh

_OWN: dict[str, Any] = {  # a class that is a Stage and takes its options by name
    "clip": Clip,
    "compeft": Compeft,
    "dare": Dare,
    "identity": IdentityStage,
    "quantise": Quantise,
    "random-k": RandomK,
    "sign": Sign,
    "ternary": Ternary,
    "top-k": TopK,
    "weigh": Weigh,
}

STAGES: EntryTable[Any] = EntryTable(
    "stages", _OWN, offers("kind", "role", "payload", "on_client", "on_server", "model_dump")
)


def build_stages(run: RunConfig) -> tuple[Stage, ...]:
    """The run's stages in the client's order; the run's weighting is always the first.

    What `[privacy]` asks of clients comes next: their clipping, or their noise unless the run file places it.

    Raises:
        RunFileError: unknown stages or options, or stages that can't follow each other; all at once.
    """
    asked: list[Stage] = []
    problems: list[str] = []
    for index, section in enumerate(run.stages):
        try:
            asked.append(_build(run, f"stages.{index}", section))
            problems.extend(_search_problems(run, f"stages.{index}", asked[-1]))
        except RunFileError as error:
            problems.extend(error.problems)
    kinds = [section.kind for section in run.stages]
    known = [(kind, _role_of(kind)) for kind in kinds if kind == Noise.kind or kind in STAGES]
    if len(known) == len(run.stages):  # else the places would be wrong
        noise_first = isinstance(run.privacy, LocalPrivacy) and "noise" not in dict(known)
        problems.extend(composition_problems(known, noise_first=noise_first))
    if problems:
        raise RunFileError("run file", problems)
    return (Weigh(by=run.federation.weighting), *_of_privacy(run), *asked)


def _role_of(kind: str) -> Role:
    """The role of a stage, or of the place of the noise, which the table has not."""
    role: Role = Noise.role if kind == Noise.kind else STAGES[kind].role
    return role


def _build(run: RunConfig, where: str, section: StageSection) -> Any:
    """One stage of the run file; the place of the noise has its options from `[privacy]`."""
    if section.kind != Noise.kind:
        return build_option(where, STAGES, section.kind, section.options)
    if not isinstance(run.privacy, LocalPrivacy):
        problem = "is where [privacy] kind 'local' adds its noise; add that, or remove it"
        raise RunFileError("run file", [f"{where} (noise): {problem}"])
    if section.options:
        keys = ", ".join(sorted(section.options))
        raise RunFileError("run file", [f"{where} (noise): {keys} came; its options are those of [privacy]"])
    return _noise(run.privacy)


def _search_problems(run: RunConfig, where: str, stage: Stage) -> list[str]:
    """What stands against a scale that each client searches on its held-out rows."""
    if not isinstance(stage, Compeft) or stage.alpha != SEARCH:
        return []
    what, instead = f"{where}.alpha ({stage.kind}): '{SEARCH}'", "use stage 'ternary'"
    if run.data.heldout > 0:
        return []
    return [f"{what} needs held-out rows; set data.heldout above 0, or {instead}"]


def _of_privacy(run: RunConfig) -> tuple[Stage, ...]:
    """The stages that `[privacy]` adds in front.

    An adaptive bound is the server's alone: a client that clipped to it would always be within it.
    """
    privacy = run.privacy
    if isinstance(privacy, ClientLevelPrivacy) and privacy.target_quantile is None:
        return (Bound(clip_norm=privacy.clip_norm),)
    if isinstance(privacy, LocalPrivacy) and all(section.kind != Noise.kind for section in run.stages):
        return (_noise(privacy),)
    return ()


def _noise(privacy: LocalPrivacy) -> Noise:
    return Noise(
        clip_norm=privacy.clip_norm, noise_multiplier=privacy.noise_multiplier, seeded=privacy.seeded
    )


def build_downlink(run: RunConfig) -> Stage | None:
    """The stage that compresses the state's way down; None where the run has none.

    Raises:
        RunFileError: an unknown stage or option, one that does not compress, or one that can't serve there.
    """
    if run.downlink is None:
        return None
    kind, options = run.downlink.kind, run.downlink.options
    stage: Stage = build_option("downlink", STAGES, kind, options)
    problem = _downlink_problem(kind, stage)
    if problem is not None:
        raise RunFileError("run file", [f"downlink ({kind}): {problem}"])
    return stage


def _downlink_problem(kind: str, stage: Stage) -> str | None:
    if isinstance(stage, Compeft) and stage.alpha == SEARCH:
        return f"alpha = '{SEARCH}' needs a client's held-out rows; use 'ternary'"
    if stage.role != "lossy":
        compressing = ", ".join(name for name, known in STAGES.items() if known.role == "lossy")
        return f"it compresses nothing, and only compressing serves on the way down; use one of {compressing}"
    return None
