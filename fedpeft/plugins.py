"""Entries of the tables from other packages: by entry point, and in one process by decorator.

A package offers, say, a stage in its ``pyproject.toml``::

    [project.entry-points."fedpeft.stages"]
    halve = "my_package:Halve"

Whoever installs it can name it in a run file as any of ours. Nothing is imported before a run asks for it,
and no code travels: the owner of each device installs the package and lists it in ``policy.plugins``, and the
roll call of a run compares name, version and digest of what the run uses at all ends. Where one of ours has
the name, ours is meant.

`register` does the same for objects of the calling program. They have no distribution that other ends could
compare, so they serve simulations in that process.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from fedpeft.errors import MissingExtraError, UsageError

GROUPS = (
    "stages",
    "strategies",
    "lora_rules",
    "peft_methods",
    "tasks",
    "formats",
    "metrics",
    "sinks",
    "attacks",
)
"""What a package can offer; the group of an entry point has ``fedpeft.`` before it."""

T = TypeVar("T")
_REGISTERED: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
_allowed: frozenset[str] | None = None  # distributions, by normal name; None: whatever is installed


@dataclass(frozen=True, order=True)
class Plugin:
    """A distribution that offers entries.

    Attributes:
        name: of the distribution, in its normal form.
        version: as it states it.
        digest: SHA-256 (hex) of the files of the packages that its entries are in.
    """

    name: str
    version: str
    digest: str

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({self.digest[:12]})"


class EntryTable(MutableMapping[str, T], Generic[T]):
    """Our own entries of one kind, and those that plugins offer; these are loaded when they are asked for.

    Args:
        group: see `GROUPS`.
        own: ours; they come first, and their names can't be taken.
        adapt: from a name and what a plugin offers under it to an entry; raises a `FedPEFTError` where it is
            none.
    """

    def __init__(
        self, group: str, own: Mapping[str, T], adapt: Callable[[str, Any], T] = lambda name, offered: offered
    ) -> None:
        self._group, self._own, self._adapt = group, dict(own), adapt
        self._loaded: dict[tuple[str, int], T] = {}

    def __getitem__(self, name: str) -> T:
        """Look up ours, then what was registered here, then what is installed.

        Raises:
            KeyError: none of these has the name.
            MissingExtraError: a plugin can't be loaded, or two offer the name.
        """
        if name in self._own:
            return self._own[name]
        offered = _find_offered(self._group, name)
        known = self._loaded.get((name, id(offered)))
        if known is None:
            known = self._loaded[name, id(offered)] = self._adapt(name, offered)
        return known

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._own or name in self._others())

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from (name for name in self._others() if name not in self._own)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __setitem__(self, name: str, entry: Any) -> None:
        register(self._group, name)(entry)

    def __delitem__(self, name: str) -> None:
        del _REGISTERED[self._group][name]

    @property
    def own(self) -> Mapping[str, T]:
        """Ours alone."""
        return self._own

    def _others(self) -> list[str]:
        return list(dict.fromkeys((*_REGISTERED[self._group], *_find_installed(self._group))))


def offers(*attributes: str) -> Callable[[str, Any], Any]:
    """Return what an `EntryTable` calls with what a plugin offers: it must have these attributes.

    An attribute `kind` must be the name itself: messages and headers carry it.
    """

    def adapt(name: str, offered: Any) -> Any:
        missing = [attribute for attribute in attributes if not hasattr(offered, attribute)]
        if missing:
            raise MissingExtraError(
                f"the plugin '{name}' has no {' and no '.join(missing)}; see its protocol"
            )
        if "kind" in attributes and offered.kind != name:
            raise MissingExtraError(f"the plugin '{name}' calls itself '{offered.kind}'; make them the same")
        return offered

    return adapt


def instance_of(kind: type[T]) -> Callable[[str, Any], T]:
    """Return what an `EntryTable` calls with what a plugin offers: it must be of a class."""

    def adapt(name: str, offered: Any) -> T:
        if not isinstance(offered, kind):
            found = type(offered).__name__
            raise MissingExtraError(f"the plugin '{name}' is a {found}; a {kind.__name__} is needed")
        return offered

    return adapt


def register(group: str, name: str) -> Callable[[T], T]:
    """Return a decorator that enters an object under a name, in this process.

    Raises:
        UsageError: there is no such group.
    """
    if group not in GROUPS:
        raise UsageError(f"plugins of group {group!r} came; there are {', '.join(GROUPS)}")

    def enter(offered: T) -> T:
        _REGISTERED[group][name] = offered
        return offered

    return enter


def allow_plugins(distributions: Collection[str] | None) -> None:
    """Let this process load entries of these distributions only; None: of all that are installed."""
    global _allowed
    _allowed = None if distributions is None else frozenset(map(normal_name, distributions))


def is_allowed(plugin: Plugin) -> bool:
    """Whether this process may load entries of a distribution."""
    return _allowed is None or plugin.name in _allowed


def plugin_of(group: str, name: str) -> Plugin | None:
    """Return the installed distribution that offers a name, allowed or not; None: no one does.

    Nothing of it is imported.
    """
    if name in _REGISTERED[group]:
        return None
    points = _entry_points(group, tuple(sys.path)).get(name, ())
    return _plugin(points[0], tuple(sys.path)) if points else None


def normal_name(distribution: str) -> str:
    """Return the form of a distribution's name in which equal names are equal."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _find_offered(group: str, name: str) -> Any:
    if name in _REGISTERED[group]:
        return _REGISTERED[group][name]
    points = _find_installed(group).get(name, ())
    if not points:
        raise KeyError(name)
    if len(points) > 1:
        owners = " and ".join(sorted(_owner(point) for point in points))
        raise MissingExtraError(f"'{name}' of fedpeft.{group} is offered by {owners}; uninstall one of them")
    return _load(points[0], group)


def _load(point: importlib.metadata.EntryPoint, group: str) -> Any:
    try:
        return point.load()
    except Exception as error:
        raise MissingExtraError(
            f"'{point.name}' of fedpeft.{group}, which {_owner(point)} offers, can't be loaded: "
            f"{type(error).__name__}: {' '.join(str(error).split())}; mend or uninstall that package"
        ) from error


def _find_installed(group: str) -> Mapping[str, tuple[importlib.metadata.EntryPoint, ...]]:
    """What allowed distributions offer, by name."""
    found = _entry_points(group, tuple(sys.path))
    if _allowed is None:
        return found
    return {name: points for name, points in found.items() if {_owner(point) for point in points} <= _allowed}


@functools.lru_cache(maxsize=64)
def _entry_points(
    group: str, path: tuple[str, ...]
) -> Mapping[str, tuple[importlib.metadata.EntryPoint, ...]]:
    """By name; read once for each list of folders in which Python looks."""
    found: dict[str, tuple[importlib.metadata.EntryPoint, ...]] = {}
    for point in importlib.metadata.entry_points(group=f"fedpeft.{group}"):
        found[point.name] = (*found.get(point.name, ()), point)
    return dict(sorted(found.items()))


def _owner(point: importlib.metadata.EntryPoint) -> str:
    return normal_name(point.dist.metadata["Name"]) if point.dist is not None else "unnamed"


@functools.lru_cache(maxsize=64)
def _plugin(point: importlib.metadata.EntryPoint, path: tuple[str, ...]) -> Plugin:
    """Read once for each list of folders in which Python looks: what was loaded stays what it was."""
    version = point.dist.version if point.dist is not None else "0"
    roots: set[str] = {point.module.partition(".")[0]}
    if point.dist is not None:
        groups = {f"fedpeft.{group}" for group in GROUPS}
        offers = [other for other in point.dist.entry_points if other.group in groups]
        roots |= {other.module.partition(".")[0] for other in offers}
    return Plugin(_owner(point), version, _digest(sorted(roots)))


def _digest(packages: Collection[str]) -> str:
    """SHA-256 over names and contents of all files of some packages, without importing them."""
    whole = hashlib.sha256()
    for package in packages:
        for name, path in _files(package):
            content = hashlib.sha256(path.read_bytes()).digest()
            whole.update(f"{package}/{name}\n".encode() + content)
    return whole.hexdigest()


def _files(package: str) -> list[tuple[str, Path]]:
    spec = importlib.util.find_spec(package)
    if spec is None:
        return []
    found = [Path(spec.origin)] if spec.origin and not spec.submodule_search_locations else []
    pairs = [(path.name, path) for path in found]
    for folder in spec.submodule_search_locations or ():
        pairs += [
            (path.relative_to(folder).as_posix(), path)
            for path in Path(folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        ]
    return sorted(pairs)
