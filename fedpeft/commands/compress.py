"""`fedpeft compress` and `fedpeft decompress`: adapters as small files.

What is compressed is the change of each tensor since the run began: the adapter's weights minus those of the
untrained adapter, where the adapter lies in its run's folder (the first checkpoint tells, else the run's
seed). The file says how to draw the untrained adapter again, with its digest, so that it is enough by itself
beside the base model. An adapter without a run, or with `--raw`, is compressed as it is, which costs quality:
LoRA's factor A starts at random, and its start is then part of what is thinned out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from fedpeft import __version__
from fedpeft.codec import Distortion, Encoded, Expert, compress_named, dense_named, distortion, write_expert
from fedpeft.codec.expert_file import SUFFIX
from fedpeft.commands.arguments import adapter_and_run, adapter_folder
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
from fedpeft.config.option_tables import build_option
from fedpeft.errors import FedPEFTError, ModelError, RunFileError, StateError, UsageError
from fedpeft.ledger.run_place import run_folder_of
from fedpeft.reporting.text import byte_size
from fedpeft.runtime.files import folder_atomically, storage
from fedpeft.stages import STAGES, StageContext
from fedpeft.stages.alpha_search import SEARCH, search_alpha
from fedpeft.stages.compeft import Compeft
from fedpeft.stages.ternary import Ternary
from fedpeft.updates.update import Arrays, Update, arrays_digest

METHODS: dict[str, Any] = {kind: STAGES[kind] for kind in ("ternary", "compeft")}
_HERE = StageContext(seed=0, round=1, client="expert")


def compress_command(
    adapter: Path,
    out: Path,
    *,
    density: float,
    method: str,
    alpha: str | None,
    raw: bool,
    force: bool,
    run_file: Path | None = None,
) -> None:
    """Write an adapter's change as signs and scales to a `.fpz` file, and print what that costs.

    Args:
        method: "ternary" or "compeft", with the options of the stage of that name.
        alpha: of ComPEFT: a number, or "search" for the one that serves the held-out rows of the adapter's
            run best.
        run_file: that run, where it is not beside the adapter.

    Raises:
        UsageError: `out` is no `.fpz` name, or options out of range.
        StateError: `out` is there already and `force` is off.
        FedPEFTError: the adapter or its run cannot be read.
    """
    _check_file(out, force=force)
    options: dict[str, Any] = {"density": density} | ({} if alpha is None else {"alpha": _number(alpha)})
    stage = _stage(method, options)
    source = read_adapter(adapter)
    if raw:
        source = Adapter(source.config, source.weights)
    delta = delta_of(source)
    tensors = compress_named(
        delta, lambda deltas: stage.compress(deltas, _HERE), lambda name: delta[name].size > 0
    )
    if isinstance(stage, Compeft) and stage.alpha == SEARCH:
        found = _search_scale(adapter, run_file, source, tensors)
        tensors = cast(dict[str, Encoded], dict(found.encoded))
        options |= {"alpha": found.metrics["alpha"]}
        print(f"alpha       {options['alpha']:g}, chosen on the clients' held-out rows")
    metadata = {
        "fedpeft": __version__,
        "base_digest": _base_of(source),
        "adapter_config": dict(source.config),
        "method": {"kind": method, **options},
        "start": None
        if source.start is None
        else source.start.model_dump(mode="json", exclude_defaults=True),
    }
    with storage(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    size = write_expert(out, Expert(metadata, tensors))
    init = run_folder_of(adapter_folder(adapter)) if source.start is not None and adapter.is_dir() else None
    _read_again(out, init, add_delta(source.initial, dense_named(tensors)))
    entries = sum(array.size for array in delta.values())
    _print(out, size, entries, distortion(delta, dense_named(tensors)), started=source.start is not None)


def _stage(method: str, options: Mapping[str, Any]) -> Ternary | Compeft:
    """The stage that the command line describes; options are the command's own, so are their mistakes."""
    try:
        stage: Ternary | Compeft = build_option("-", METHODS, method, options)
    except RunFileError as error:
        lines = [problem.replace("-: ", "--method: ", 1) for problem in error.problems]
        raise UsageError("; ".join(line.replace("-.", "--", 1) for line in lines)) from error
    return stage


def decompress_command(path: Path, out: Path, *, init: Path | None, force: bool) -> None:
    """Write the adapter of a `.fpz` file as a folder that `peft` loads.

    Args:
        init: a run's folder, whose first checkpoint is the start; default: the start is drawn again.

    Raises:
        UsageError: `path` is no file.
        StateError: `out` is in the way.
        FedPEFTError: the file is corrupt, or its base model cannot be loaded.
    """
    if not path.is_file():
        raise UsageError(f"{path} is no file; give a {SUFFIX} file that fedpeft compress wrote")
    check_out(out, path, force=force)
    source = read_adapter(path, init)
    with storage(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with folder_atomically(out) as fresh:
        write_folder(fresh, source.config, source.weights)
        compare_written(fresh, source.weights, source.start)
    print(f"adapter  {out}\nweights  {arrays_digest(source.weights)}")


def _read_again(out: Path, init: Path | None, weights: Weights) -> None:
    """Refuse a file whose adapter isn't the one that was written, and take it away.

    Raises:
        ModelError: its start, drawn again, is another, or its tensors are.
    """
    try:
        if arrays_digest(read_adapter(out, init).weights) != arrays_digest(weights):
            raise ModelError(f"{out} does not decompress to what was compressed; the adapter is kept")
    except FedPEFTError:
        out.unlink()
        raise


def _search_scale(
    adapter: Path, run_file: Path | None, source: Adapter, tensors: Mapping[str, Encoded]
) -> Update:
    """The tensors with the scale that serves the held-out rows of the adapter's run best."""
    scores = AdapterScores(with_held_out_test_set(adapter_and_run(adapter, run_file, ())[1]), source.config)

    def loss(delta: Arrays) -> float:
        return scores.of(add_delta(source.initial, delta))["loss"]

    context = replace(_HERE, client=str(adapter), held_out_loss=loss)
    return search_alpha(Update({}, encoded=tensors), Update(delta_of(source)), context)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text  # the stage says what it takes


def _base_of(source: Adapter) -> str:
    """The base's digest where the adapter's run is known; else its name in the adapter's config."""
    if source.start is not None:
        return source.start.base_digest
    return f"name:{source.config.get('base_model_name_or_path') or 'unknown'}"


def _check_file(out: Path, *, force: bool) -> None:
    if out.suffix != SUFFIX:
        raise UsageError(f"--out {out} needs a name that ends with {SUFFIX}")
    if out.is_dir() or (out.exists() and not force):
        raise StateError(f"--out {out} is there already; replace it with --force, or choose another name")


def _print(out: Path, size: int, entries: int, lost: Distortion, *, started: bool) -> None:
    bits, smaller = 8 * size / max(1, entries), 2 * entries / size
    print(f"expert      {out}")
    print(f"size        {byte_size(size)}: {bits:.3f} bits per weight, {smaller:.1f}x smaller than bf16")
    print(f"dense       {byte_size(4 * entries)} as fp32, {byte_size(2 * entries)} as bf16")
    print(f"distortion  {lost.relative_l2:.3f} relative L2, cosine {lost.cosine:.3f}")
    if not started:
        print("start       unknown: the weights themselves were compressed, not their change")
