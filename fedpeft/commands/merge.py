"""`fedpeft merge`: one adapter from several of one base.

Rules act on what each adapter learned: its weights minus the untrained adapter's, where all adapters began at
the same one. Where that is not so, or not known, they act on the weights themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedpeft.adapters import (
    AdapterStack,
    FactorsOnly,
    Merger,
    adapter_stack,
    best_on_held_out,
    first_difference,
    merger_named,
    whole_tensors,
)
from fedpeft.commands.experts import (
    Adapter,
    Weights,
    add_delta,
    compare_written,
    delta_of,
    read_adapter,
    write_folder,
)
from fedpeft.commands.export import check_out
from fedpeft.commands.held_out import AdapterScores, with_held_out_test_set
from fedpeft.config.run_file import load_run
from fedpeft.config.sections import RunConfig
from fedpeft.errors import ModelError, UsageError
from fedpeft.runtime.files import folder_atomically, storage

LAM = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
GRIDS: Mapping[str, Mapping[str, Sequence[float]]] = {  # what --select tries, per method
    "average": {},
    "task-arithmetic": {"lam": LAM},
    "ties": {"lam": (0.3, 0.5, 1.0, 1.5), "density": (0.1, 0.2, 0.5)},
    "dare": {"lam": LAM, "drop_rate": (0.5, 0.9)},
    "lines": {"beta": (0.0, 0.25, 0.5, 1.0)},
    "pcb": {"lam": (0.5, 1.0, 1.5), "density": (0.1, 0.2)},
    "breadcrumbs": {"lam": LAM},
}


def merge_command(
    adapters: Sequence[Path],
    out: Path,
    *,
    method: str,
    weights: str | None,
    options: Sequence[str],
    run_file: Path | None,
    select: bool,
    force: bool,
) -> None:
    """Merge adapters (folders, run folders or `.fpz` files) and write a folder that `peft` loads.

    Args:
        weights: comma-separated, one per adapter; default 1 each.
        options: the method's coefficients as ``name=value``.
        run_file: the run whose held-out rows choose the coefficients under `select`.

    Raises:
        UsageError: too few adapters, or options that cannot be read.
        ModelError: adapters of different bases or configurations.
        UpdateError: unknown method or coefficient, or weights that cannot be used.
        FedPEFTError: what else cannot be read or written.
    """
    if len(adapters) < 2:
        raise UsageError(f"{len(adapters)} adapter came; merging needs at least two")
    if select and run_file is None:
        raise UsageError("--select needs --run RUN.toml: its clients' held-out rows choose the coefficients")
    rules = _candidates(method, _options(options), select=select)
    for path in adapters:
        check_out(out, path, force=force)
    sources = [read_adapter(path) for path in adapters]
    check_one_kind(sources, adapters)
    initial = _common_start(sources)
    deltas = [delta_of(source) if initial is not None else source.weights for source in sources]
    stack = adapter_stack(deltas, _weights(weights))
    whole = whole_tensors(stack) if initial is None and sources[0].config.get("peft_type") == "LORA" else ()
    candidates = [FactorsOnly(rule) if whole else rule for rule in rules]
    if select and run_file is not None:
        chosen, delta = _select(stack, candidates, load_run(run_file), sources[0], initial)
    else:
        chosen, delta = candidates[0], candidates[0].merge(stack)
    with storage(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    merged = add_delta(initial, delta)
    with folder_atomically(out) as fresh:
        write_folder(fresh, sources[0].config, merged)
        compare_written(fresh, merged, sources[0].start)
    print(f"adapter  {out}\nmethod   {method} {chosen}")
    _say_bases(sources)
    if whole:
        print(f"averaged {len(whole)} tensors that are no factors (embeddings, heads)")
    if initial is None:
        print("start    not one and the same: whole weights were merged, not what was learned")


def check_one_kind(sources: Sequence[Adapter], paths: Sequence[Path]) -> None:
    """Refuse adapters of different bases, where that is known, and of configurations that differ for good.

    Raises:
        ModelError: naming the first difference.
    """
    first = sources[0]
    for source, path in zip(sources[1:], paths[1:], strict=True):
        found = first_difference(first.config, source.config)
        if found is not None:
            key, one, other = found
            raise ModelError(
                f"{paths[0]} and {path} differ in {key} ({one!r} and {other!r}); merge adapters of one base"
                " and one configuration"
            )
        bases = [each.start.base_digest for each in (first, source) if each.start is not None]
        if len(bases) == 2 and bases[0] != bases[1]:
            raise ModelError(
                f"{paths[0]} and {path} have different bases (digests {bases[0][:12]} and {bases[1][:12]});"
                " merge adapters of one base"
            )


def _say_bases(sources: Sequence[Adapter]) -> None:
    """Name the bases that the adapters say they belong to, if they are several."""
    names = list(dict.fromkeys(str(source.config.get("base_model_name_or_path")) for source in sources))
    if len(names) > 1:
        print(f"bases    {', '.join(names)}: taken for one, as the tensors fit; the result names the first")


def _common_start(sources: Sequence[Adapter]) -> Weights | None:
    digests = {source.start.digest if source.start else "" for source in sources}
    return sources[0].initial if len(digests) == 1 else None


def _select(
    stack: AdapterStack,
    candidates: Sequence[Merger],
    run: RunConfig,
    like: Adapter,
    initial: Weights | None,
) -> tuple[Merger, Mapping[str, NDArray[np.float32]]]:
    """The rule that scores best on the clients' held-out rows, and what it makes of the adapters."""
    scores = AdapterScores(with_held_out_test_set(run), like.config)
    return best_on_held_out(stack, candidates, lambda delta: scores.gain(add_delta(initial, delta)))


def _candidates(method: str, given: Mapping[str, float], *, select: bool) -> list[Merger]:
    """The rule as given; to select among, one for each point of its grid, what was given staying as it is."""
    asked = _merger(method, given)
    if not select:
        return [asked]
    grid = {name: values for name, values in GRIDS[method].items() if name not in given}
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return [_merger(method, {**given, **point}) for point in points]


def _merger(method: str, options: Mapping[str, float]) -> Merger:
    """`dare` draws its masks from seed 0 unless another is given."""
    seeded = {"seed": 0, **options} if method == "dare" else options
    return merger_named(method, **seeded)


def _options(items: Sequence[str]) -> dict[str, float]:
    options: dict[str, float] = {}
    for item in items:
        name, equals, text = item.partition("=")
        try:
            options[name.strip()] = int(text) if text.strip().lstrip("-").isdigit() else float(text)
        except ValueError:
            equals = ""
        if not equals or not name.strip():
            raise UsageError(f"--set {item!r}: write NAME=NUMBER, such as lam=0.5")
    return options


def _weights(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--weights {text!r}: write numbers with commas between, such as 2,1,1") from None
