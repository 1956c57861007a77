"""Templates: what they render and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.data.templates import compile_template
from fedpeft.errors import DataError


@given(
    st.dictionaries(st.sampled_from(["a", "b c", "d-e"]), st.one_of(st.text(), st.integers(), st.floats()))
)
def test_renders_as_str_format_does(fields: dict[str, Any]) -> None:
    text = "".join(f"<{{{name}}}>{{{{}}}}" for name in fields)
    assert compile_template(text, "data.text").render(fields, "f: row 1") == text.format(**fields)


@pytest.mark.parametrize(
    "text", ["{a.__class__}", "{a[0]}", "{a!r}", "{a:>10}", "{}", "{0}", "{a:{b}}", "{a.b}", "{ a.b }"]
)
def test_only_names_may_stand_in_braces(text: str) -> None:
    with pytest.raises(DataError, match="write only names of fields"):
        compile_template(text, "data.text")


@pytest.mark.parametrize("text", ["{a", "a}", "{a}}", "{"])
def test_broken_braces_are_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"data\.text = .* is no template"):
        compile_template(text, "data.text")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"b": "x", "c": 1},
            r"^f\.jsonl: row 7: field 'a', which data\.prompt needs, is missing; the row has b, c;",
        ),
        ({"a": None}, "is null"),
        ({"a": ["x"]}, r'data\.explode = "a"'),
        ({"a": {"b": 1}}, "needs text or a number"),
        ({"a": b"x"}, "needs text or a number"),
    ],
)
def test_a_row_without_a_plain_field_is_refused(fields: dict[str, Any], message: str) -> None:
    template = compile_template("{a}", "data.prompt")
    with pytest.raises(DataError, match=message) as caught:
        template.render(fields, "f.jsonl: row 7")
    assert "\n" not in str(caught.value)


def test_values_are_not_templates_themselves() -> None:
    assert compile_template("{a}", "data.text").render({"a": "{b} {{"}, "f") == "{b} {{"
