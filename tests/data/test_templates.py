"""Templates: what they render and what they refuse."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.data.templates import compile_template
from fedpeft.errors import DataError


@given(
    st.dictionaries(
        st.sampled_from(["a", "b c", "d-e"]),
        st.one_of(st.text(), st.integers(), st.floats(allow_nan=False, allow_infinity=False)),
    )
)
def test_renders_as_str_format_does_and_says_what_came_from_fields(fields: dict[str, Any]) -> None:
    text = "".join(f"<{{{name}}}>{{{{}}}}" for name in fields)
    rendered = compile_template(text, "data.text").render(fields, "f: row 1")
    assert rendered.text == text.format(**fields)
    assert [rendered.text[a:b] for a, b in rendered.cells] == [str(value) for value in fields.values()]


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
        ({"a": float("nan")}, r"field 'a'.* is nan"),
        ({"a": float("-inf")}, "is -inf"),
        ({"a": Decimal("NaN")}, "is NaN"),
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
    assert compile_template("{a}", "data.text").render({"a": "{b} {{"}, "f").text == "{b} {{"


def test_truth_values_read_as_in_a_file() -> None:
    assert compile_template("{a} {b}", "data.text").render({"a": True, "b": False}, "f").text == "true false"


@pytest.mark.parametrize("lacking", [{}, {"input": None}, {"input": ""}, {"input": float("nan")}])
def test_optional_fields_and_parts(lacking: dict[str, Any]) -> None:
    template = compile_template("{q}{?input} Given: {input}.{/input} End{input?}", "data.text")
    assert template.render({"q": "Q", **lacking}, "f").text == "Q End"
    given = template.render({"q": "Q", "input": "x"}, "f")
    assert given.text == "Q Given: x. Endx"
    assert [given.text[a:b] for a, b in given.cells] == ["Q", "x", "x"]


@pytest.mark.parametrize(
    "text", ["{?a}x", "{/a}", "{?a}{?b}x{/b}{/a}", "{?a}x{/b}", "{?a}{a}{/a}{/a}", "{??a}", "{a??}", "{?}"]
)
def test_broken_parts_are_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"data\.text"):
        compile_template(text, "data.text")
