"""What a worker process gives up before it touches anything that came from a server.

Linux lets any process do so for itself, for good, and for all that it starts:

* no new privileges: no set-user-id program helps it (`prctl`); of root's capabilities it keeps those that
  read and write files of other users, which Landlock bounds: with the others it could read the agent's
  environment, where tokens may be;
* Landlock (Linux 5.13): no file outside of the folders that it is left; since 6.7 no TCP connection or
  listening either; since 6.12 no signal to others, nor abstract sockets;
* a system-call filter, where the library libseccomp is installed: no sockets of any kind, no tracing of other
  processes, no other way around these.

Elsewhere, and where a container forbids it, what is missing is named and the worker goes on. `ctypes` calls
the kernel and the C library: what wraps Landlock and libseccomp for Python is not maintained.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_CREATE, _ADD, _RESTRICT = 444, 445, 446  # system calls, the same on every processor
_VERSION_FLAG, _PATH_BENEATH = 1, 1
_NO_NEW_PRIVS = 38
_CAPABILITIES_VERSION, _KEPT_CAPABILITIES = 0x20080522, 0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
_O_PATH, _O_CLOEXEC = 0o10000000, 0o2000000

# Rights by Landlock's bits; the first version of it knows the first thirteen.
_EXECUTE, _WRITE, _READ, _LIST = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REFER, _TRUNCATE, _IOCTL = 1 << 13, 1 << 14, 1 << 15
_READING = _EXECUTE | _READ | _LIST
_ON_FILES = _EXECUTE | _WRITE | _READ | _TRUNCATE | _IOCTL
_KNOWN = {1: 13, 2: 14, 3: 15, 4: 15}  # bits by version; later ones know sixteen
_ALL_TCP, _ALL_SCOPES = 0b11, 0b11
_TCP_SINCE, _SCOPES_SINCE = 4, 6

_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | 13  # EACCES
_EVERY_THREAD = 4
_SOCKETS = ("socket", "bind", "listen", "accept", "accept4", "connect")
_AROUND = (
    "ptrace",
    "process_vm_readv",
    "process_vm_writev",
    "io_uring_setup",
    "bpf",
    "perf_event_open",
    "userfaultfd",
    "add_key",
    "keyctl",
    "request_key",
    "mount",
    "umount2",
    "pivot_root",
    "chroot",
    "setns",
    "unshare",
    "open_by_handle_at",
)

_SYSTEM = (
    "/usr",
    "/lib",
    "/lib32",
    "/lib64",
    "/bin",
    "/sbin",
    "/etc",
    "/proc",
    "/sys",
)
_DEVICES = ("/dev",)


@dataclass(frozen=True)
class Allowed:
    """What is left to a worker beside its Python and the system's libraries.

    Attributes:
        readable, writable: files and folders; those that don't exist are passed over.
        network: whether it may open connections.
        private: a folder that it must not be able to list; empty: there is none to try.
    """

    readable: tuple[str, ...] = ()
    writable: tuple[str, ...] = ()
    network: bool = False
    private: str = ""


def confine(allowed: Allowed) -> list[str]:
    """Give up everything else, before any thread is started; what the system does not let it give up.

    Returns:
        One line for each part that is not in force; none where all are.
    """
    if sys.platform != "linux":
        return [f"{sys.platform} has neither Landlock nor seccomp"]
    libc = ctypes.CDLL(None, use_errno=True)
    missing = []
    if libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0):
        missing.append(f"no new privileges: {_reason()}")
    return [
        *missing,
        *_drop_capabilities(libc),
        *_restrict_files(libc, allowed),
        *_filter_calls(allowed),
    ]


def find_gaps(allowed: Allowed) -> list[str]:
    """Try what a confined process cannot do, rather than believe that the system did as it was told.

    Returns:
        One line for each thing that went through.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").split("\n")
    facts = dict(line.split(":\t", 1) for line in status if ":\t" in line)
    gaps = []
    if facts.get("NoNewPrivs") != "1":
        gaps.append("no new privileges: the system does not say that it is in force")
    if int(facts.get("CapEff", "-1"), 16) & ~_KEPT_CAPABILITIES:
        gaps.append("capabilities: some of root's are left")
    if facts.get("Seccomp") != "2":
        gaps.append("system calls: the system does not say that a filter is in force")
    if not allowed.network and _goes(lambda: socket.socket().close()):
        gaps.append("network: a socket can be opened")
    if _goes(lambda: Path(f"/proc/{os.getppid()}/environ").read_bytes()):
        gaps.append("files: the environment of the agent's process can be read")
    if allowed.private and _goes(lambda: os.listdir(allowed.private)):
        gaps.append(
            f"files: {allowed.private} can be listed; are the rows or the model in a folder above it?"
        )
    return gaps


def _goes(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except OSError:
        return False
    return True


def landlock_version() -> int:
    """The kernel's version of Landlock; 0: it has none, or it is off."""
    libc = ctypes.CDLL(None, use_errno=True)
    return max(0, int(libc.syscall(_CREATE, None, ctypes.c_size_t(0), _VERSION_FLAG)))


def _drop_capabilities(libc: ctypes.CDLL) -> list[str]:
    """Give up root's capabilities but those for files; other users have none."""
    head = struct.pack("=Ii", _CAPABILITIES_VERSION, 0)
    had = ctypes.create_string_buffer(24)
    if libc.capget(head, had):
        return [f"capabilities: {_reason()}"]
    low = [word & _KEPT_CAPABILITIES for word in struct.unpack("=6I", had.raw)[:3]]
    return [f"capabilities: {_reason()}"] if libc.capset(head, struct.pack("=6I", *low, 0, 0, 0)) else []


def _restrict_files(libc: ctypes.CDLL, allowed: Allowed) -> list[str]:
    version = landlock_version()
    if not version:
        return [f"files: the kernel has no Landlock ({_reason()})"]
    known = (1 << _KNOWN.get(version, 16)) - 1
    tcp = _ALL_TCP if version >= _TCP_SINCE and not allowed.network else 0
    scopes = _ALL_SCOPES if version >= _SCOPES_SINCE else 0
    fields = (known, tcp, scopes)[: 1 if version < _TCP_SINCE else 2 if version < _SCOPES_SINCE else 3]
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    rules = int(libc.syscall(_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0))
    if rules < 0:
        return [f"files: Landlock is refused ({_reason()})"]
    try:
        for paths, rights in (
            ((*_SYSTEM, *_python_folders(), *_with_targets(allowed.readable)), _READING),
            (_DEVICES, _READING | _WRITE | _TRUNCATE | _IOCTL),
            (allowed.writable, known & ~_EXECUTE),
        ):
            for path in paths:
                _allow(libc, rules, path, rights & known)
        if libc.syscall(_RESTRICT, rules, 0):
            return [f"files: Landlock is refused ({_reason()})"]
    finally:
        os.close(rules)
    return [] if tcp or allowed.network else [f"TCP: Landlock {version} of this kernel does not know it"]


def _allow(libc: ctypes.CDLL, rules: int, path: str, rights: int) -> None:
    """One rule: these rights, for a file or for all below a folder."""
    try:
        handle = os.open(path, _O_PATH | _O_CLOEXEC)
    except OSError:
        return
    try:
        if not Path(path).is_dir():
            rights &= _ON_FILES
        rule = struct.pack("=Qi", rights, handle)
        libc.syscall(_ADD, rules, _PATH_BENEATH, rule, 0)
    finally:
        os.close(handle)


def _python_folders() -> Iterable[str]:
    """Where modules, and the libraries that they load, lie; never a whole home or root folder."""
    libraries = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    found = {sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix, *sys.path, *libraries}
    refused = {"", "/", os.path.expanduser("~")}
    return sorted(path for path in found if path not in refused)


def _with_targets(paths: Sequence[str]) -> Iterable[str]:
    """Paths, and what links directly inside of folders point to: a hub's cache is made of them."""
    for path in paths:
        yield path
        if os.path.isdir(path):
            yield from (os.path.realpath(entry) for entry in os.scandir(path) if entry.is_symlink())


def _filter_calls(allowed: Allowed) -> list[str]:
    """Have the kernel refuse system calls, through libseccomp, which knows their numbers."""
    try:
        library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    except OSError:
        return ["system calls: the library libseccomp.so.2 is not installed"]
    library.seccomp_init.restype = ctypes.c_void_p
    filter_ = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(_ALLOW)))
    if not filter_:
        return ["system calls: libseccomp makes no filter"]
    try:
        library.seccomp_attr_set(filter_, _EVERY_THREAD, ctypes.c_uint32(1))
        for name in _AROUND if allowed.network else (*_SOCKETS, *_AROUND):
            number = library.seccomp_syscall_resolve_name(name.encode())
            if number > 0:  # else this processor has no such call
                library.seccomp_rule_add_array(filter_, ctypes.c_uint32(_REFUSE), number, 0, None)
        failed = library.seccomp_load(filter_)
    finally:
        library.seccomp_release(filter_)
    return [f"system calls: a filter is refused ({os.strerror(-failed)})"] if failed else []


def _reason() -> str:
    return os.strerror(ctypes.get_errno())
