"""What would be refused, found before anything large is loaded: every problem of a run at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fedpeft.aggregation.lora_rules import lora_problems
from fedpeft.attacks import build_attack
from fedpeft.compatibility import conflicts_of
from fedpeft.config.option_tables import unknown_name
from fedpeft.config.sampling import cohort_size
from fedpeft.config.sections import RunConfig
from fedpeft.data.section_layout import section_problems
from fedpeft.errors import FedPEFTError, RunFileError
from fedpeft.evaluation.metrics import metrics_of
from fedpeft.models.loftq import loftq_problem
from fedpeft.models.methods import METHODS, base_refusal, with_options
from fedpeft.models.offsite import NO_EMULATOR, emulator_at
from fedpeft.models.options import peft_problems
from fedpeft.privacy.run_checks import privacy_problems
from fedpeft.reporting.sinks import SINKS
from fedpeft.rounds.buffered.buffer_rules import buffer_problems
from fedpeft.rounds.strategy_table import geometry_problems, strategy_problems
from fedpeft.spaces import space_options
from fedpeft.stages import build_downlink, build_stages
from fedpeft.training.lean import lean_problems
from fedpeft.training.optimizers import check_names
from fedpeft.training.record_rules import record_problems
from fedpeft.training.zeroth_rules import zeroth_problems


def problems_of(run: RunConfig) -> list[str]:
    """One line per problem that can be known from the run file and the tables."""
    problems: list[str] = []
    checks: tuple[Callable[[], object], ...] = (
        lambda: _refuse(peft_problems(run.peft, run.model.task)),
        lambda: _refuse(_base_problems(run)),
        lambda: _refuse(section_problems(run.data, run.model.task)),
        lambda: check_names(run.training),
        lambda: space_options(run.space),
        lambda: _refuse(zeroth_problems(run)),
        lambda: _refuse(lean_problems(run)),
        lambda: build_stages(run),
        lambda: build_downlink(run),
        lambda: _refuse(lora_problems(run)),
        lambda: _refuse(geometry_problems(run)),
        lambda: build_attack(run),
        lambda: _refuse(privacy_problems(run)),
        lambda: _refuse(record_problems(run)),
        lambda: _refuse(conflicts_of(run)),
        lambda: _refuse([unknown_name("output.sinks", n, SINKS) for n in run.output.sinks if n not in SINKS]),
        lambda: metrics_of(run.model.task, run.evaluation.metrics, answers=has_answers(run)),
    )
    for check in checks:
        try:
            check()
        except RunFileError as error:
            problems.extend(error.problems)
        except FedPEFTError as error:
            problems.append(str(error))
    clients = run.data.partitioner.clients
    problems.extend(_federation_problems(run, clients))
    problems.extend(buffer_problems(run, clients))
    for place, group in enumerate(run.groups):  # what is wrong with a group and not with the run itself
        own = problems_of(run.of_group(group))
        problems.extend(f"groups.{place}: {problem}" for problem in own if problem not in problems)
    return problems


def has_answers(run: RunConfig) -> bool:
    """Rows have a prompt and an answer, which metrics can compare."""
    return run.data.train == "embedded" or (run.data.prompt is not None and run.data.answer is not None)


def refuse_problems(run: RunConfig, *, source: str) -> None:
    """Raise all problems of a run at once.

    Raises:
        RunFileError: if there is any.
    """
    problems = problems_of(run)
    if problems:
        raise RunFileError(source, problems)


def simulation_problems(run: RunConfig) -> list[str]:
    """What only agents that answer in real time can hold, and a simulation on its virtual clock.

    Without the clock a simulation would have to say who answers first, and would say something else each
    time.
    """
    federation = run.federation
    if federation.clock is not None:
        return []
    problems = []
    if federation.over_selection:
        problems.append(
            "federation.over_selection: a simulation needs a virtual clock to tell who answers first; set"
            " [federation.clock], or submit the run to a server, where answers come in real time"
        )
    if federation.mode == "buffered":
        problems.append(
            "federation.mode 'buffered' needs a virtual clock in a simulation, to tell who answers when; set"
            " [federation.clock], or submit the run to a server"
        )
    return problems


def _federation_problems(run: RunConfig, clients: int | None) -> list[str]:
    """Cohort and strategy, as far as the number of clients is known before the rows are read."""
    federation = run.federation
    if clients is None:
        return strategy_problems(federation.strategy, cohort=10**9)
    try:
        return strategy_problems(federation.strategy, cohort_size(federation.sampling, clients))
    except FedPEFTError as error:
        return [str(error)]


def _base_problems(run: RunConfig) -> list[str]:
    """What the method and the way it is trained ask of the base model."""
    method = METHODS.get(run.peft.method)
    if method is None:
        return []
    method = with_options(method, run.peft.options)
    problems = []
    if run.training.gradient_checkpointing and not method.gradient_checkpointing:
        problems.append(f"training.gradient_checkpointing: {method.name} cannot train with it; remove it")
    reason = base_refusal(method, run.model.quantization)
    if reason is not None:
        problems.append(f"model.quantization: {method.name} on {run.model.quantization}: {reason}")
    problems += _plug_problems(run)
    start = loftq_problem(method.name, run.peft.options, run.model.quantization)
    if start is not None:
        problems.append(start)
    return problems


def _plug_problems(run: RunConfig) -> list[str]:
    """What `evaluation.plug_into` asks of the base."""
    folder = Path(run.model.path).expanduser()
    if run.evaluation.plug_into is None or not folder.is_dir() or emulator_at(folder) is not None:
        return []
    return [f"evaluation.plug_into: {NO_EMULATOR}, or remove it"]


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise RunFileError("run file", problems)
