"""A PostgreSQL of one's own for a test: Debian's binaries, a cluster in a folder, a socket and no network."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

USERS = ("postgres", "nobody")  # it refuses to run as root


@dataclass(frozen=True)
class Cluster:
    """A running server, and where its programs are."""

    programs: Path
    folder: Path
    user: str

    def url(self, database: str) -> str:
        """A new, empty database, as SQLAlchemy names it."""
        self.call("createdb", "--maintenance-db=postgres", database)
        return f"postgresql+psycopg://{self.user}@/{database}?host={self.folder}"

    def call(self, program: str, *words: str) -> str:
        """What one of its programs prints."""
        where = ["--host", str(self.folder), "--username", self.user]
        return output([str(self.programs / program), *where, *words])

    def control(self, *words: str) -> None:
        """`pg_ctl` on this cluster."""
        where = [
            "--pgdata",
            str(self.folder / "data"),
            "--log",
            str(self.folder / "log"),
            "--wait",
            "--silent",
        ]
        output([str(self.programs / "pg_ctl"), *where, *words], self.user)

    def start(self) -> None:
        """Listen on a socket in the folder."""
        self.control("start", "-o", f"-c listen_addresses='' -c unix_socket_directories={self.folder}")

    def stop(self, how: str = "fast") -> None:
        """End it, "immediate" as a power cut does."""
        self.control("stop", "--mode", how)


def output(words: list[str], user: str | None = None) -> str:
    """Standard output of a program, run as `user` where this is root; the error's own text where it fails."""
    as_user = user if os.geteuid() == 0 else None
    done = subprocess.run(
        words, user=as_user, cwd="/", capture_output=True, text=True, timeout=120, env={"LC_ALL": "C"}
    )
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


def programs() -> Path | None:
    """Where `initdb` and its like are; Debian keeps them off the path."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return debian[-1].parent if debian else None


@contextmanager
def cluster(bin_folder: Path) -> Iterator[Cluster]:
    """A cluster below the folder for temporary files, until the block ends."""
    user = pwd.getpwuid(os.geteuid()).pw_name
    folder = Path(tempfile.mkdtemp(prefix="fedpeft-pg-"))  # short: a socket's path has 107 characters at most
    if os.geteuid() == 0:
        known = {entry.pw_name: entry for entry in pwd.getpwall()}
        user = next(name for name in USERS if name in known)
        os.chown(folder, known[user].pw_uid, known[user].pw_gid)
    made = Cluster(bin_folder, folder, user)
    try:
        words = ["--pgdata", str(folder / "data"), "--auth", "trust", "--username", user, "--no-sync"]
        output([str(bin_folder / "initdb"), "--encoding", "UTF8", *words], user)
        made.start()
        try:
            yield made
        finally:
            made.stop("immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
