"""From a row's label to a class id."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedpeft.data.columns import ClassName
from fedpeft.data.describe import list_names, show
from fedpeft.errors import DataError

_DIGITS = re.compile(r"(\d+)")


def natural_key(name: str) -> tuple[tuple[tuple[int, int, str], ...], str]:
    """Sort key under which client2 comes before client10; the name itself tells 1 and 01 apart."""
    pieces = _DIGITS.split(name)
    return tuple(_order_of(piece) for piece in pieces), name


def _order_of(piece: str) -> tuple[int, int, str]:
    """Numbers before text, by value; compared as text, since identifiers may have thousands of digits."""
    if not piece.isdecimal():
        return 1, 0, piece
    digits = "".join(str(int(digit)) for digit in piece).lstrip("0")
    return 0, len(digits), digits


def plain_value(value: object, field: str, where: str) -> str | int:
    """A label or a client id as text or integer; booleans count as 0 and 1, whole floats as integers.

    Raises:
        DataError: null, or neither text nor a whole number.
    """
    if isinstance(value, str):
        return value  # as a class by its name and number, if it is one
    if isinstance(value, (bool, int)):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    state = "missing or null" if value is None else show(value)
    raise DataError(f"{where}: field '{field}' is {state}; it must be text or a whole number")


@dataclass(frozen=True)
class LabelMap:
    """Class ids by label. Labels match by their text, so that "3" in a CSV file is the 3 of a run file.

    Attributes:
        ids: class id by the label's text; several labels may share an id.
        names: by class id, the first label that has it.
    """

    ids: Mapping[str, int]
    names: tuple[str, ...]

    def class_id(self, value: str | int, field: str, where: str) -> int:
        """The class id of one label.

        Raises:
            DataError: the label is outside the map.
        """
        found = self.ids.get(str(value))
        if found is None and isinstance(value, ClassName):
            found = self.ids.get(str(value.number))
        if found is None:
            raise DataError(
                f"{where}: field '{field}' is {show(value)}, which is outside the label map "
                f"({list_names(self.ids)}); add it to data.labels or leave the row out with data.filter"
            )
        return found


def label_map(labels: tuple[str | int, ...] | Mapping[str, int]) -> LabelMap:
    """The map that a run file gives: labels in the order of their ids, or a table from label to id.

    Raises:
        DataError: a label occurs twice, or ids are not 0, 1, 2 ... without a gap.
    """
    if isinstance(labels, Mapping):
        pairs = [(str(label), int(id_)) for label, id_ in labels.items()]
    else:
        pairs = [(str(label), id_) for id_, label in enumerate(labels)]
    ids = dict(pairs)
    if len(ids) != len(pairs):
        raise DataError(
            f"data.labels names a label twice ({list_names(label for label, _ in pairs)}); name each once"
        )
    wanted = range(len(set(ids.values())))
    if not ids or sorted(set(ids.values())) != list(wanted):
        raise DataError(
            f"data.labels has the class ids {list_names(sorted(set(ids.values())))}; "
            "they must be 0, 1, 2 ... without a gap"
        )
    names = {id_: label for label, id_ in reversed(pairs)}
    return LabelMap(ids, tuple(names[id_] for id_ in wanted))


def make_label_map(values: Iterable[str | int]) -> LabelMap:
    """The default map: the distinct labels in natural order, or in that of a file that names its classes."""
    distinct = set(values)
    named = [value for value in distinct if isinstance(value, ClassName)]
    if named and len(named) == len(distinct):
        return label_map(tuple(str(value) for value in sorted(named, key=lambda value: value.number)))
    names = sorted({str(value) for value in distinct}, key=natural_key)
    return label_map(tuple(names))
