"""Processes on loopback, for benchmarks and integration tests: Flower's SuperLink and nodes, and our own.

No question is answered here; `bench_federation.py` and `tests/integration` import it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
APP = ROOT / "simulations" / "flower_app"
START_TIMEOUT_S, RUN_TIMEOUT_S = 90.0, 400.0


def program(name: str) -> str:
    """An installed command's path."""
    return str(Path(sys.executable).parent / name)


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def start_process(
    words: Sequence[str], folder: Path, log: Path, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """A process in a group of its own that works in `folder` and appends to `log`."""
    with log.open("ab") as file:
        return subprocess.Popen(
            words,
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the process listens.

    Raises:
        RuntimeError: it ended, or took too long.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise RuntimeError(f"nothing listens on port {port}: {log.read_text()[-2000:]}")


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


def environment(**more: str) -> dict[str, str]:
    """For processes that import this checkout, one thread each, and tell nobody of it."""
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "server", "client"))
    return os.environ | {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": paths,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "NO_COLOR": "1",
        **more,
    }


@dataclass(frozen=True)
class Flown:
    """One `flwr run` that has ended: its log, Flower's status of it, and the status's details."""

    log: str
    status: str
    details: str


@dataclass(frozen=True)
class Superlink:
    """A SuperLink with its SuperNodes, each in a folder of its own."""

    folder: Path
    environment: dict[str, str]

    def flwr(self, *words: str, timeout_s: float = 60.0) -> str:
        """The output of a `flwr` command."""
        done = subprocess.run(
            [program("flwr"), *words],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        return done.stdout + done.stderr

    def submit(self, run_file: Path, out: Path) -> None:
        """`flwr run`, whose end is not waited for.

        Raises:
            RuntimeError: it did not begin.
        """
        config = f'fedpeft.run-file="{run_file}" fedpeft.out="{out}"'
        log = self.flwr("run", str(APP), "local", "--run-config", config)
        if re.search(r"started run (\d+)", log) is None:
            raise RuntimeError(f"flwr run: {log[-2000:]}")

    def run(self, run_file: Path, out: Path) -> Flown:
        """`flwr run` to its end.

        Raises:
            RuntimeError: it did not begin.
        """
        config = f'fedpeft.run-file="{run_file}" fedpeft.out="{out}"'
        words = ("run", str(APP), "local", "--stream", "--run-config", config)
        log = self.flwr(*words, timeout_s=RUN_TIMEOUT_S)
        begun = re.search(r"started run (\d+)", log)
        if begun is None:
            raise RuntimeError(f"flwr run: {log[-2000:]}")
        deadline = time.monotonic() + 30
        while True:  # the log ends a moment before the status changes
            listed = json.loads(self.flwr("ls", "local", "--run-id", begun[1], "--format", "json"))
            row = listed["runs"][0]
            if row["status"].startswith("finished") or time.monotonic() > deadline:
                return Flown(log, row["status"], row["status-details"])
            time.sleep(1)


@contextmanager
def superlink(folder: Path, nodes: int) -> Iterator[Superlink]:
    """Flower's processes, until the block ends.

    Raises:
        RuntimeError: one of them does not listen.
    """
    link, *ports = free_ports(1 + nodes)
    (folder / "home").mkdir()
    (folder / "home" / "config.toml").write_text(
        f'[superlink]\ndefault = "local"\n[superlink.local]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
    )
    made = Superlink(folder, environment(FLWR_HOME=str(folder / "home")))
    processes: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:

        def start(name: str, words: Sequence[str]) -> tuple[subprocess.Popen[bytes], Path]:
            (folder / name).mkdir()
            log = folder / f"{name}.log"
            process = start_process(words, folder / name, log, made.environment)
            stack.callback(end_group, process)
            processes.append(process)
            return process, log

        options = ["--insecure", "--port", str(link), "--disable-runtime-dependency-installation"]
        wait_for_port(link, *start("superlink", [program("flower-superlink"), *options]))
        begun = []
        for number, port in enumerate(ports):
            node = f"partition-id={number} num-partitions={nodes}"
            where = ["--insecure", "--superlink", f"127.0.0.1:{link}", "--port", str(port)]
            words = [program("flower-supernode"), *where, "--node-config", node]
            begun.append((port, *start(f"node-{number}", words)))
        for port, process, log in begun:
            wait_for_port(port, process, log)
        try:
            yield made
        finally:
            for process in processes:  # all at once: each takes seconds to end
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
