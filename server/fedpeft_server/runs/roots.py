"""Which of the server's files a submitter's run file may name: those below roots that the operator set.

A run file's `data.test`, `model.path` and `evaluation.plug_into` are opened by the server. Without roots a
submitter names none of its files: the embedded model and rows are in every installation, and base models of
the hub are named ``hub:OWNER/NAME``, which can be no folder. Admins, who could set roots themselves, are not
bound.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedpeft.config.sections import HUB_MODEL, RunConfig
from fedpeft.data.hub import PREFIX, parse_hub_source
from fedpeft.errors import DataError, RunFileError

_EMBEDDED = "embedded"
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}(/[A-Za-z0-9][A-Za-z0-9_.-]{0,95})?")
_PATTERN = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Roots:
    """The table of what submitters may name.

    Attributes:
        allowed: folders, and data sets of the hub as ``datasets:OWNER/NAME``; none by default.
    """

    allowed: tuple[str, ...] = ()

    def refuse(self, run: RunConfig) -> None:
        """Refuse a submitter's run that names anything else.

        Raises:
            RunFileError: with every such name; nothing is said of what lies there.
        """
        problems = [*self._model_problems(run), *self._source_problems(run)]
        if problems:
            raise RunFileError("run file", problems)

    def _model_problems(self, run: RunConfig) -> Iterator[str]:
        sections = (("model.path", run.model.path), ("evaluation.plug_into", run.evaluation.plug_into))
        for key, path in sections:
            if path is None or path == _EMBEDDED or path.startswith(HUB_MODEL) or self._is_below(path):
                continue
            problem = self._problem(key, path)
            if _HUB_NAME.fullmatch(path):  # whether there is a folder of that name here is not looked at
                problem += f"; a base model of the hub is named '{HUB_MODEL}{path}' here"
            yield problem

    def _source_problems(self, run: RunConfig) -> Iterator[str]:
        test = run.data.test
        for source in (test,) if isinstance(test, str) else test or ():
            if source == _EMBEDDED:
                continue
            allowed = self._is_data_set(source) if source.startswith(PREFIX) else self._is_below(source)
            if not allowed:
                yield self._problem("data.test", source)

    def _is_data_set(self, source: str) -> bool:
        try:
            named = parse_hub_source(source)[0]
        except DataError:
            return False
        return f"{PREFIX}{named}" in self.allowed

    def _is_below(self, path: str) -> bool:
        """Whether a path, or all that a pattern can match, lies below a root, links followed."""
        if "\0" in path or ".." in Path(path).parts:
            return False
        fixed = Path(*_iterate_fixed_parts(Path(path).expanduser().parts))
        try:
            place = fixed.resolve()
        except (OSError, RuntimeError):
            return False
        return any(place.is_relative_to(Path(root).resolve()) for root in self.allowed if _is_folder(root))

    def _problem(self, key: str, value: str) -> str:
        return (
            f"{key}: '{value[:200]}' is not among what submitters may name on this server; its operator lists"
            " folders and data sets under roots in server.toml"
        )


def _is_folder(root: str) -> bool:
    return not root.startswith(PREFIX)


def _iterate_fixed_parts(parts: Sequence[str]) -> Iterator[str]:
    """The parts of a path before the first that is a pattern."""
    for part in parts:
        if _PATTERN.search(part):
            return
        yield part
