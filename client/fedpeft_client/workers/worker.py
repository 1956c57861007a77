"""The resident worker: a process of its own that keeps the base model loaded and runs the client's functions.

It is started afresh, not forked: gRPC's threads do not survive a fork. It reads orders from a socket that it
inherits and ends when the agent closes it, or is gone. Nothing of an order is code: the app is named by the
agent itself.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.config.device_task import read_device_task
from fedpeft.errors import DataError, FedPEFTError, ModelError, PolicyError, RowsChangedError
from fedpeft.flower.execute import Outcome, execute, load_app
from fedpeft.plugins import allow_plugins, is_allowed
from fedpeft.runtime.cancellation import clear_cancellation, install_cancellation
from fedpeft.runtime.crash_points import crash_point
from fedpeft.runtime.frames import Frame, pack, read_frame
from fedpeft.runtime.parent_exit import exit_with_parent
from fedpeft.transport.disclosure import Disclosure
from fedpeft.wire.failures import from_text, to_record
from fedpeft.wire.task_content import read_task_content
from fedpeft_client.workers.replicas import ReplicaShelf
from fedpeft_client.workers.round_cost import ACCOUNT, costs_of_round
from fedpeft_client.workers.stage_memory import memory_bytes, memory_of
from fedpeft_client.workers.start_cache import StartShelf
from fedpeft_client.workers.worker_process import CLIENT_APP

if TYPE_CHECKING:
    from fedpeft.config.sections import RunConfig
    from fedpeft.data.federated import FederatedData
    from fedpeft.participant.assembly import Admit


def main(fd: int, gaps: Sequence[str] = ()) -> None:
    """Serve orders until the agent hangs up.

    Args:
        gaps: what this process could not give up though its owner asks for that: every order is refused.
    """
    install_cancellation()
    exit_with_parent(os.getppid())  # beside its work: a killed agent's successor wants the memory
    with socket.socket(fileno=fd) as pipe, pipe.makefile("rb") as orders:
        while (order := read_frame(orders)) is not None:
            clear_cancellation()  # it was meant for an order before this one
            pipe.sendall(pack(_refuse(gaps) if gaps else execute_order(order)))


def _refuse(gaps: Sequence[str]) -> Frame:
    text = (
        f"policy.needs_confinement asks for a worker that is confined, and this one is not: {'; '.join(gaps)}"
    )
    return Frame({"error": to_record(PolicyError(text, {"needs_confinement": None}))})


def execute_order(order: Frame) -> Frame:
    """One order's answer; what goes wrong is part of it."""
    header = order.header
    if header["kind"] == ACCOUNT:
        return costs_of_round(order)
    try:
        digest, rows, fresh = _ensure_loaded(header, order.parts["content"])
    except FedPEFTError as error:
        return Frame({"error": to_record(error)})
    crash_point("agent.worker.loaded")
    shelf = ReplicaShelf(Path(header["replicas"])) if header.get("replicas") else None
    replica = shelf.get(header["run_digest"]) if shelf is not None and fresh else None
    outcome: Outcome = execute(
        load_app(header["app"]),
        header["kind"],
        header["group"],
        order.parts["content"],
        memory_of(order.parts["memory"]),
        client=header["client"],
        run=header["run_digest"],
        disclosure=_disclosure(header),
        replica=replica,
    )
    if shelf is not None and outcome.replica:
        shelf.put(header["run_digest"], outcome.replica)
    crash_point("agent.worker.done")
    return Frame(
        {"error": _record_of(outcome.error), "base_digest": digest, "rows": rows, "loaded": fresh},
        {"content": outcome.content, "memory": memory_bytes(outcome.memory)},
    )


def _record_of(text: str) -> dict[str, Any] | None:
    """What a client function failed with, if it did."""
    if not text:
        return None
    error, (name, _, reason) = from_text(text), text.partition(": ")
    return {"class": name, "text": reason} if error is None else to_record(error)


def _ensure_loaded(header: Any, content: bytes) -> tuple[str, str, bool]:
    """Load the order's run unless it is loaded; digests of model and rows, and whether that was now.

    Foreign apps load for themselves.
    """
    if header["app"] != CLIENT_APP:
        return "", "", False
    # Here, as it brings torch and all that stands on it.
    from fedpeft.participant.load_device import Own, load_own_resident
    from fedpeft.participant.loaded_run import get_loaded_run, has_loaded_run, set_loaded_run

    digest, pins, fresh = header["run_digest"], header["base_digests"], False
    allow_plugins(header.get("plugins", ()))
    if not has_loaded_run(digest):
        described = read_device_task(header["device_task"])
        if described.digest != digest:
            raise ModelError(f"what came is not what run {digest[:12]} is; nothing was trained")
        run = described.as_run
        _refuse_plugins(run)
        _refuse_problems(run, header)
        device, files = header.get("device", "cpu"), header.get("files", {})
        own = Own(header["client"], Path(header["data"]), header["model"], device, **files)
        admit = _admission(header, own.device)
        start = _start(run.of_client(own.client), header, content)
        set_loaded_run(load_own_resident(run, own, admit=admit, start_bytes=start))
        if start and header.get("starts"):  # now it is known to fit this model
            StartShelf(Path(header["starts"])).put(digest, start)
        fresh = True
    resident = get_loaded_run(digest)
    if pins and resident.base_digest not in pins:
        raise PolicyError(
            f"the base model has digest {resident.base_digest[:12]}, which policy.base_digests does not name",
            {"base_digests": None},
        )
    rows = resident.data.rows_digest
    if header.get("rows") and header["rows"] != rows:
        raise RowsChangedError(
            "the rows here are not those that the roll call of this run was answered with; start the agent"
            " with those again, or wait for the next run"
        )
    return resident.base_digest, rows, fresh


def _refuse_plugins(run: RunConfig) -> None:
    """Refuse a run that uses installed packages which the owner does not list; nothing of them is imported.

    Raises:
        PolicyError: with their names.
    """
    from fedpeft.config.run_plugins import plugins_of

    unlisted = [str(plugin) for plugin in plugins_of(run) if not is_allowed(plugin)]
    if unlisted:
        text = f"the run uses the plugin {', '.join(unlisted)}, which policy.plugins does not list"
        raise PolicyError(text, {"plugins": None})


def _refuse_problems(run: RunConfig, header: Any) -> None:
    """Check the run file here too, with this device's copy of the base model: the server's word is none."""
    from fedpeft.planning.preflight import refuse_problems

    own = run.of_client(header["client"])
    if header["model"]:
        own = own.model_copy(update={"model": own.model.model_copy(update={"path": header["model"]})})
    refuse_problems(own, source="run file")


def _start(run: RunConfig, header: Any, content: bytes) -> bytes:
    """What spares this process to compute the model's start, if that came now or before; else empty.

    A run that starts by its seed has no use for one, whatever a server sends. Nothing is written yet.

    Raises:
        ModelError: what came is no start.
    """
    from fedpeft.models.loftq import start_of
    from fedpeft.models.starts import decomposition_of

    if start_of(run.peft.options) is None:
        return b""
    came = read_task_content(content).start
    if came:
        decomposition_of(came)
        return came
    shelf = header.get("starts")
    return StartShelf(Path(shelf)).get(header["run_digest"]) if shelf else b""


def _disclosure(header: Any) -> Disclosure:
    metrics = header.get("metrics")
    return Disclosure(None if metrics is None else frozenset(metrics), header.get("min_count", 1))


def _admission(header: Any, device: str) -> Admit:
    """Refuse, before the base model is read, what there are too few rows or too little memory for."""
    from fedpeft.models.device import available_memory, device_named
    from fedpeft.planning.memory_admission import refuse_oversized, without_lengths

    most_mib = header.get("max_memory_mib")
    owners = float("inf") if most_mib is None else most_mib * 2**20

    def admit(run: RunConfig, data: FederatedData) -> None:
        _refuse_few_rows(run, data, header.get("min_rows", 1), header.get("min_count", 1))
        where = device_named(device)
        limit = int(min(available_memory(where), owners))
        rows = without_lengths(run, data) if run.hides_rows else data
        refuse_oversized(run, rows, limit=limit, gpu=where.type != "cpu")

    return admit


def _refuse_few_rows(run: RunConfig, data: FederatedData, least: int, least_told: int) -> None:
    """Refuse a run that would train on too few of the owner's rows, or tell how few they are.

    A run that hides rows is not refused: who stays away because of its rows tells about them.

    Raises:
        DataError: too few rows to train on; as for rows that cannot be used, so that nobody can tell these
            apart.
        PolicyError: the run weighs updates by rows, and these are too few for their number to be told.
    """
    if run.hides_rows:
        return
    rows = sum(len(client.train) for client in data.clients)
    if rows < least:
        raise DataError(f"the run would train on {rows} rows; policy.min_rows is {least}")
    if rows < least_told and run.federation.weighting == "examples":
        text = f"the run weighs updates by rows, and {rows} are fewer than policy.min_count = {least_told}"
        raise PolicyError(text, {"min_count": float(least_told)})


if __name__ == "__main__":
    main(int(sys.argv[1]))
    os._exit(0)  # taking the libraries down in order takes seconds and frees nothing that the end does not
