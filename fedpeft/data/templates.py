"""Templates over a row's fields: names in braces, and parts for rows that have a field; no `str.format`."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

from fedpeft.data.describe import list_names, show
from fedpeft.errors import DataError

_GRAMMAR = (
    "write {name}, {name?} for a field that a row may lack, or {?name}...{/name} for a part that needs it"
)


@dataclass(frozen=True)
class Rendered:
    """A row's text, and which of it came from the row's fields rather than from the template.

    `cells` are (first, behind the last) characters.
    """

    text: str
    cells: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Piece:
    """Literal text, then perhaps a field.

    Attributes:
        optional: whether a row may lack the field.
        needs: the field without which the piece is left out; None: it is there for every row.
    """

    literal: str
    field: str | None
    optional: bool
    needs: str | None


@dataclass(frozen=True)
class Template:
    """A compiled template.

    Attributes:
        key: the run file's key that holds it, for messages.
        pieces: in order.
    """

    key: str
    pieces: tuple[_Piece, ...]

    @property
    def fields(self) -> frozenset[str]:
        """Names of all fields that a rendered text can depend on."""
        named = {name for piece in self.pieces for name in (piece.field, piece.needs)}
        return frozenset(name for name in named if name is not None)

    def render(self, fields: Mapping[str, object], where: str) -> Rendered:
        """Return the text for one row.

        Raises:
            DataError: a field is missing, null, no number, or no plain value; the message begins with
                `where`.
        """
        texts: list[str] = []
        cells: list[tuple[int, int]] = []
        length = 0
        for piece in self.pieces:
            if piece.needs is not None and not _has(fields, piece.needs):
                continue
            texts.append(piece.literal)
            length += len(piece.literal)
            if piece.field is None or (piece.optional and not _has(fields, piece.field)):
                continue
            value = self._value(fields, piece.field, where)
            texts.append(value)
            cells.append((length, length + len(value)))
            length += len(value)
        return Rendered("".join(texts), tuple(cells))

    def _value(self, fields: Mapping[str, object], name: str, where: str) -> str:
        value = fields.get(name)
        if isinstance(value, str):
            return value
        if isinstance(value, bool):
            return "true" if value else "false"
        if value is None or _is_no_number(value):
            state = "missing" if name not in fields else "null" if value is None else str(value)
            raise DataError(
                f"{where}: field '{name}', which {self.key} needs, is {state}; the row has"
                f" {list_names(fields)}; mend the row,"
                f" write {{{name}?}} where rows may lack it, or leave it out with data.filter"
            )
        if isinstance(value, (list, dict, set, tuple, bytes)):
            raise DataError(
                f"{where}: field '{name}', which {self.key} needs, is {show(value)}; needs text or a number "
                f'(a list becomes one row per item with data.explode = "{name}")'
            )
        return str(value)


def _has(fields: Mapping[str, object], name: str) -> bool:
    """Whether a row has a value: absent, null, NaN and empty text are none."""
    value = fields.get(name)
    return value is not None and value != "" and not _is_nan(value)


def _is_no_number(value: object) -> bool:
    """Whether a value is NaN, as which pandas writes a missing one, or infinite."""
    return isinstance(value, float | Decimal) and not math.isfinite(value)


def _is_nan(value: object) -> bool:
    return isinstance(value, float | Decimal) and math.isnan(value)


def compile_template(text: str, key: str) -> Template:
    """Parse a template such as ``"{question} {choices}"``; doubled braces stand for themselves.

    A field is ``{name}``, or ``{name?}`` where rows may lack it. What stands between ``{?name}`` and
    ``{/name}`` is left out of rows that lack the field; such parts do not nest. Nothing else may stand in
    braces: attributes, indices, conversions and format specifications are refused, so that a run file from
    elsewhere cannot reach into objects.

    Args:
        text: the template.
        key: the run file's key, for messages.

    Raises:
        DataError: it does not parse or asks for more than a field.
    """
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise DataError(
            f"{key} = {show(text)} is no template ({error}); write a field as {{name}}, a brace itself twice"
        ) from error
    pieces: list[_Piece] = []
    needs: str | None = None
    for literal, written, spec, conversion in parsed:
        name = None if written is None else written.removeprefix("?").removeprefix("/").removesuffix("?")
        if spec or conversion or not _is_plain(name):
            raise DataError(
                f"{key} = {show(text)} asks for {show(written)} with more than a field name; "
                "write only names of fields, such as {text}, in braces"
            )
        begins, ends = (written or "").startswith("?"), (written or "").startswith("/")
        if (begins and needs is not None) or (ends and needs != name):
            raise DataError(f"{key} = {show(text)}: {{{written}}} has no counterpart; {_GRAMMAR}")
        optional = (written or "").endswith("?")
        pieces.append(_Piece(literal, None if begins or ends else name, optional, needs))
        needs = name if begins else None if ends else needs
    if needs is not None:
        raise DataError(f"{key} = {show(text)}: {{?{needs}}} has no {{/{needs}}}; {_GRAMMAR}")
    return Template(key, tuple(pieces))


def _is_plain(name: str | None) -> bool:
    return name is None or (name != "" and not name.isdigit() and not set(name) & set(".[]?"))
