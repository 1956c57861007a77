"""A plan in the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedpeft.aggregation.lora_rules import LORA_RULES
from fedpeft.planning.buffered_draws import BufferedPlan
from fedpeft.planning.draws import DrawSpread, RoundsPlan
from fedpeft.planning.memory import Memory
from fedpeft.planning.plan import DataPlan, ModelPlan, Plan, PlannedTraffic, SpacePlan
from fedpeft.planning.privacy_forecast import PrivacyPlan
from fedpeft.planning.rule import RulePlan
from fedpeft.planning.walk import WalkPlan
from fedpeft.reporting.text import byte_size, count_noun, duration, list_names, printable

Line = tuple[str, str, str]  # what, how much, detail


def show_plan(console: Console, plan: Plan) -> None:
    """Print the plan as a table, then what would be refused. Names go in as `Text`, never read as markup."""
    sections = [
        list(_model_lines(plan.model)) if plan.model else [],
        list(_data_lines(plan.data)) if plan.data else [],
        list(_space_lines(plan.space)) if plan.space else [],
        list(_round_lines(plan.rounds)) if plan.rounds else [],
        list(_walk_lines(plan.walk)) if plan.walk else [],
        list(_rule_lines(plan.rule)) if plan.rule else [],
        list(_privacy_lines(plan.privacy)) if plan.privacy else [],
        list(_traffic_lines(plan.traffic)) if plan.traffic else [],
        list(_memory_lines(plan.memory)) if plan.memory else [],
        list(_group_lines(plan)),
    ]
    if any(sections):
        console.print(_table(plan, [lines for lines in sections if lines]))
    if plan.problems:
        console.print(Text("would be refused:", style="bold red"))
    else:
        by_server = " by a server" if plan.simulation_problems else ""
        console.print(Text(f"would be refused{by_server}: nothing"))
    _print_lines(console, plan.problems)
    if plan.simulation_problems:
        console.print(Text("would be refused by fedpeft simulate:", style="bold"))
    _print_lines(console, plan.simulation_problems)


def _print_lines(console: Console, problems: tuple[str, ...]) -> None:
    for problem in problems:
        console.print(Text(f"  {printable(problem)}"), soft_wrap=True)


def _table(plan: Plan, sections: list[list[Line]]) -> Table:
    title = Text(f"{printable(plan.run)} · plan, nothing is trained · seed {plan.seed}", style="bold")
    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_header=False, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column(style="dim")
    for lines in sections:
        for what, amount, detail in lines:
            table.add_row(Text(what), Text(amount), Text(detail))
        table.add_section()
    return table


def _model_lines(model: ModelPlan) -> Iterator[Line]:
    held = model.dtype if model.quantization == "none" else model.quantization
    where = "" if model.device == "cpu" else f", on {model.device}"
    yield "base model", held, printable(f"{model.path}, {model.task}{where}")
    yield "method", model.method, "averaging it averages models exactly" if model.linear else ""
    share = f"{100 * model.trained / model.total:.2f}% of {model.total:,}"
    yield "trained parameters", f"{model.trained:,}", share
    for note in model.notes:
        yield "note", "", printable(note)


def _data_lines(data: DataPlan) -> Iterator[Line]:
    spread = f"rows min {data.rows_least:,}, median {data.rows_median:,.0f}, max {data.rows_most:,}"
    yield "clients", f"{data.clients:,}", spread
    yield "training rows", f"{data.rows:,}", f"{data.heldout_rows:,} more held out"
    yield "test rows", f"{data.test_rows:,}", "" if data.test_rows else "nothing will be evaluated"
    limit = f"over {data.max_length} tokens; longest row: {data.longest_row:,}"
    yield "cut rows", f"{data.cut_rows:,}", limit
    if data.dropped_rows:
        yield (
            "dropped rows",
            f"{data.dropped_rows:,}",
            "that could not be used, or without a token to learn or score",
        )
    if data.unused_rows or data.unused_clients:
        left = count_noun(data.unused_clients, "client")
        yield "unused rows", f"{data.unused_rows:,}", f"that no client holds; {left} left out"
    for note in data.notes:
        yield "note", "", printable(note)


def _space_lines(space: SpacePlan) -> Iterator[Line]:
    yield "space", space.kind, ""
    for what, amount in space.facts.items():
        yield f"  {what}", amount, ""
    if space.replay_s is not None:
        yield "  replay of a whole run", _short_time(space.replay_s), "one thread, by a timed part of it"


def _round_lines(rounds: RoundsPlan) -> Iterator[Line]:
    partly = f"from the first {rounds.drawn_rounds:,} rounds" if rounds.drawn_rounds < rounds.rounds else ""
    yield "rounds", f"{rounds.rounds:,}", partly
    if rounds.buffered is not None:
        yield from _buffer_lines(rounds.buffered)
    places = "" if rounds.places is None else f"the first {rounds.places:,} to answer count"
    asked = _range(rounds.asked_per_round)
    detail = "; ".join(filter(None, (asked, places)))
    yield "clients asked per round", f"{rounds.asked_per_round.mean:,.4g}", detail
    turns = rounds.participations_per_client
    yield "participations per client", f"{turns.mean:,.4g}", _range(turns)
    each = rounds.steps_per_client_round
    yield "local steps", f"{rounds.steps:,}", f"{each.mean:,.4g} per client and round{_range(each, ', ')}"
    yield "examples read", f"{rounds.examples:,}", "all clients, all rounds"
    if rounds.round_s is not None and rounds.run_s is not None:
        low, high = duration(rounds.round_s.least), duration(rounds.round_s.most)
        yield "round, virtual clock", duration(rounds.round_s.mean), f"{low} to {high}"
        yield (
            "run, virtual clock",
            duration(rounds.run_s),
            f"{100 * rounds.lost:.1f}% of answers lost or late",
        )


def _walk_lines(walk: WalkPlan) -> Iterator[Line]:
    rise = f"{walk.rise:+.3g}"
    length = f"{walk.length:.2g} per parameter"
    what = f"to a loss of {walk.loss:.3g}, by a random walk as long as the moves ({length})"
    if walk.diverges:
        what += f": IT WILL PROBABLY DIVERGE; training.lr of at most {walk.safe_lr:.1g} is safer"
    yield "zeroth-order noise", rise, what


def _rule_lines(rule: RulePlan) -> Iterator[Line]:
    of = {"": "", "product": "; on LoRA's products B A", "entries": "; on the entries of updates"}
    yield "strategy", rule.strategy, f"{rule.summary}{of[rule.geometry]}"
    if rule.attackers:
        yield "  under attack", rule.attack, printable(f"by {list_names(rule.attackers)}; simulations only")


def _buffer_lines(buffered: BufferedPlan) -> Iterator[Line]:
    work = f"{count_noun(buffered.concurrency, 'client')} at work at a time"
    yield "  buffered", f"{buffered.size:,} updates", f"make a round, whoever sent them; {work}"
    speeds = "; no clock, so as if all were equally quick" if buffered.equal_speeds else ""
    oldest = f"0 to {max(len(buffered.staleness) - 1, 0)} rounds; weight {buffered.weight}{speeds}"
    yield "  mean staleness", f"{buffered.mean_staleness:.2g}", oldest
    yield "  given up", f"over {buffered.max_staleness:,}", "rounds old; the client is asked anew"


def _privacy_lines(privacy: PrivacyPlan) -> Iterator[Line]:
    yield "differential privacy", privacy.kind, ""
    if privacy.epsilon is None or privacy.max_epsilon is None or privacy.target_delta is None:
        return
    end = "where the budget ends it" if privacy.stops else "at the end"
    yield "  epsilon", f"{privacy.epsilon:.4g}", f"{end}, at delta {privacy.target_delta:g}"
    if privacy.epsilon_cohort is not None:
        whom = "against who sees whom each round asks, the network too: sampling rate 1"
        yield "    cohort seen", f"{privacy.epsilon_cohort:.4g}", whom
    affordable = "over a million" if privacy.affordable_rounds is None else f"{privacy.affordable_rounds:,}"
    detail = f"rounds reach epsilon {privacy.max_epsilon:g}; the run charges {privacy.charged_rounds:,}"
    if privacy.stops:
        detail += ": IT WILL STOP EARLY"
    yield "  budget", affordable, detail
    if privacy.needed_multiplier is not None:
        yield (
            "  noise multiplier",
            f"{privacy.needed_multiplier:g}",
            f"the least that affords {privacy.charged_rounds:,} rounds; yours: {privacy.noise_multiplier:g}",
        )
    yield "  about", "", privacy.neighbours
    yield "  against", "", privacy.against
    if privacy.seeded:
        yield "  noise", "seeded", "THE RUN IS NOT PRIVATE: whoever knows the seed can subtract it"


def _traffic_lines(traffic: PlannedTraffic) -> Iterator[Line]:
    zero = ""
    if traffic.up_per_round_if_zero != traffic.up_per_round:
        zero = f"; depends on the values, all zero: {byte_size(traffic.up_per_round_if_zero)}"
    for label, each, client, total, more in (
        ("bytes up", traffic.up_per_round, traffic.up_per_client, traffic.up_total, zero),
        ("bytes down", traffic.down_per_round, traffic.down_per_client, traffic.down_total, ""),
    ):
        detail = f"a round; {byte_size(client)} a run, all {byte_size(total)}{more}"
        yield f"{label} per client", byte_size(each), detail


def _memory_lines(memory: Memory) -> Iterator[Line]:
    own = memory.peak - memory.base
    yield "peak memory, one worker", byte_size(memory.peak), "an estimate; libraries and rows on top"
    yield "  base model", byte_size(memory.base), "shared by all worker processes"
    yield "  beyond it", byte_size(own), "the adapter and the largest phase below"
    for what, size, detail in (
        ("adapter and state", memory.adapter + memory.state, "parameters, and what they are moved from"),
        ("training", memory.phases[0], ""),
        ("  activations", memory.activations, "of the longest batch there can be"),
        ("  gradients", memory.gradients + memory.proximal, ""),
        ("  optimiser", memory.optimizer, ""),
        ("exchange", memory.exchange, ""),
        ("evaluation", memory.evaluation, ""),
        ("allocator", memory.allocator, "freed blocks that the C library keeps"),
    ):
        yield f"    {what}", byte_size(size), detail


def _group_lines(plan: Plan) -> Iterator[Line]:
    if plan.lora_rule is not None:
        rule = LORA_RULES.get(plan.lora_rule)
        yield "LoRA rule", printable(plan.lora_rule), "" if rule is None else rule.summary
        if rule is not None and rule.residual:
            grows = "what all clients are sent grows each round by the ranks of those who answered"
            yield "  frozen part", "", f"{grows}; cap it with federation.residual_rank"
    for place, group in enumerate(plan.groups):
        rank = "" if group.rank is None else f", rank {group.rank}"
        trains = f", trains {', '.join(group.trains)}" if group.trains else ""
        held = f"base {group.quantization}{rank}{trains}"
        yield f"group {place}", count_noun(group.clients, "client"), printable(held)
        yield "  bytes per client", byte_size(group.up), f"up a round; {byte_size(group.down)} down"
        if group.peak is not None:
            yield "  peak memory", byte_size(group.peak), "predicted from shapes; libraries and rows on top"


def _short_time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else duration(seconds)


def _range(spread: DrawSpread, before: str = "") -> str:
    return "" if spread.least == spread.most else f"{before}{spread.least:,.4g} to {spread.most:,.4g}"
