"""Which templates and columns a data section asks for, and what is wrong with it."""

from __future__ import annotations

from fedpeft.config.sections import DataSection
from fedpeft.data.describe import show
from fedpeft.data.encoded import Task
from fedpeft.data.labels import label_map
from fedpeft.data.row_records import Layout
from fedpeft.data.templates import Template, compile_template
from fedpeft.errors import DataError

EMBEDDED = "embedded"
EMBEDDED_PROMPT, EMBEDDED_ANSWER = "{prompt}", "{answer}"
BY_COLUMN = ("dirichlet", "pathological", "shard", "natural")  # partitioners that look at a column


def make_layout(section: DataSection, task: Task) -> Layout:
    """The layout of the rows of a section that `section_problems` finds no fault with.

    Raises:
        DataError: a template does not parse.
    """
    prompt, answer = _templates(section, task)
    by = section.partitioner.by if section.partitioner.kind in BY_COLUMN else None
    label = section.label if task == "sequence-classification" else None
    return Layout(prompt, answer, label, by, section.user)


def _templates(section: DataSection, task: Task) -> tuple[Template, Template | None]:
    if task == "sequence-classification":
        return compile_template(section.text or "", "data.text"), None
    if section.text is not None:
        return compile_template(section.text, "data.text"), None
    prompt = EMBEDDED_PROMPT if section.prompt is None else section.prompt
    answer = EMBEDDED_ANSWER if section.answer is None else section.answer
    return compile_template(prompt, "data.prompt"), compile_template(answer, "data.answer")


def section_problems(section: DataSection, task: Task) -> list[str]:
    """All that can be known to be wrong with a data section before a file is opened, one line each."""
    return [*_form_problems(section, task), *_source_problems(section), *_parse_problems(section)]


def _form_problems(section: DataSection, task: Task) -> list[str]:
    forms = {key for key in ("prompt", "answer", "text", "label") if getattr(section, key) is not None}
    given = f"data has {', '.join(sorted(forms)) or 'no template'}"
    if task == "sequence-classification":
        wanted = "a classifier needs data.text and data.label, and no data.prompt or data.answer"
        return [] if forms == {"text", "label"} else [f"{given}; {wanted}"]
    if forms in ({"text"}, {"prompt", "answer"}) or (not forms and section.train == EMBEDDED):
        return []
    return [
        f"{given}; a language model needs either data.text, or data.prompt and data.answer, and no data.label"
    ]


def _source_problems(section: DataSection) -> list[str]:
    problems = []
    kind = section.partitioner.kind
    if section.train == EMBEDDED and kind != "iid":
        problems.append(
            f"data.partitioner.kind is '{kind}', but the embedded rows come with their clients; "
            "leave it 'iid', which then only says how many clients"
        )
    if section.test == EMBEDDED and section.train != EMBEDDED:
        problems.append(
            "data.test is 'embedded' and data.train is not; embedded tests fit embedded training rows only"
        )
    if section.partitioner.exclude and kind not in BY_COLUMN:
        problems.append(
            f"data.partitioner.exclude needs a column: partitioner '{kind}' has none, use data.filter"
        )
    return problems


def _parse_problems(section: DataSection) -> list[str]:
    problems = []
    for key in ("prompt", "answer", "text"):
        text = getattr(section, key)
        try:
            if text is not None and not compile_template(text, f"data.{key}").fields and key != "prompt":
                problems.append(
                    f"data.{key} = {show(text)} names no field, so all rows would be the same text; write a"
                    " field's name in braces, such as {answer}"
                )
        except DataError as error:
            problems.append(str(error))
    try:
        if section.labels is not None:
            label_map(section.labels)
    except DataError as error:
        problems.append(str(error))
    return problems
