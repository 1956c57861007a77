"""Templates over a row's fields: plain names in braces, nothing else of `str.format`."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass

from fedpeft.data.describe import listed, shown
from fedpeft.errors import DataError


@dataclass(frozen=True)
class Template:
    """Alternating literal text and field names.

    Attributes:
        key: the run file's key that holds it, for messages.
        parts: (literal, field that follows it or None).
    """

    key: str
    parts: tuple[tuple[str, str | None], ...]

    def render(self, fields: Mapping[str, object], where: str) -> str:
        """The text for one row.

        Raises:
            DataError: a field is missing, null, or no plain value; the message begins with `where`.
        """
        return "".join(
            literal if name is None else literal + self._value(fields, name, where)
            for literal, name in self.parts
        )

    def _value(self, fields: Mapping[str, object], name: str, where: str) -> str:
        value = fields.get(name)
        if isinstance(value, str):
            return value
        if value is None:
            state = "null" if name in fields else "missing"
            raise DataError(
                f"{where}: field '{name}', which {self.key} needs, is {state}; the row has {listed(fields)}; "
                "mend the row, change the template, or leave such rows out with data.filter"
            )
        if isinstance(value, (list, dict, set, tuple, bytes)):
            raise DataError(
                f"{where}: field '{name}', which {self.key} needs, is {shown(value)}; needs text or a number "
                f'(a list becomes one row per item with data.explode = "{name}")'
            )
        return str(value)


def compile_template(text: str, key: str) -> Template:
    """Parse a template such as ``"{question} {choices}"``; doubled braces stand for themselves.

    Only field names may stand in braces: attributes, indices, conversions and format specifications are
    refused, so that a run file from elsewhere cannot reach into objects.

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
            f"{key} = {shown(text)} is no template ({error}); write a field as {{name}}, a brace itself twice"
        ) from error
    parts: list[tuple[str, str | None]] = []
    for literal, name, spec, conversion in parsed:
        plain = name is None or (name != "" and not name.isdigit() and not set(name) & set(".[]"))
        if not plain or spec or conversion:
            raise DataError(
                f"{key} = {shown(text)} asks for {shown(name)} with more than a field name; "
                "write only names of fields, such as {text}, in braces"
            )
        parts.append((literal, name))
    return Template(key, tuple(parts))
