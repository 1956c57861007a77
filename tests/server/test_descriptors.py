"""The limit of open files is raised as far as it may be; what that leaves is said."""

from __future__ import annotations

import json
import subprocess
import sys

PROBE = """
import json, resource
from fedpeft_server.ops.fd_limit import raise_fd_limit
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 1000))
said = [raise_fd_limit(50), raise_fd_limit(500), raise_fd_limit(5000)]
print(json.dumps([said, resource.getrlimit(resource.RLIMIT_NOFILE)]))
"""


def test_the_limit_goes_up_to_what_is_needed_or_allowed() -> None:
    ran = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    said, limits = json.loads(ran.stdout)
    assert said[:2] == [None, None]
    assert "may open 1000 files and 5000 connections need 5256" in said[2]
    assert limits == [1000, 1000]
