"""Many connections at the same moment: a server whose handshakes disturb each other would crash."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.test_architecture import ROOT

# In a process of its own, as what it looks for is a crash.
PROBE = """
import socket, sys, tempfile
from pathlib import Path
from tests.server.test_doors import house
with house(Path(tempfile.mkdtemp()) / "ca") as made:
    for hello in (b"", b"\\x16\\x03\\x01", b"GET / HTTP/1.1\\r\\n\\r\\n"):
        sockets = [socket.create_connection(("127.0.0.1", made.running.port)) for _ in range(300)]
        for one in sockets:
            one.sendall(hello)
        for one in sockets:
            one.close()
print("alive")
"""


def test_connections_that_all_begin_at_once_do_not_end_the_server() -> None:
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "server", "client"))
    ran = subprocess.run(
        [sys.executable, "-c", PROBE],
        env={**os.environ, "PYTHONPATH": paths},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.strip() == "alive"
