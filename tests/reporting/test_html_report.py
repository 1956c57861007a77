"""The HTML report: sound, self-contained, escaped, complete and repeatable."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedpeft.errors import StateError, StorageError
from fedpeft.ledger.records import Evaluation, Finished, Round, Row, Score
from fedpeft.reporting.html import render_report, write_report
from fedpeft.reporting.snippet import load_snippet
from fedpeft.reporting.svg import COLOUR
from tests.reporting.rows import evaluation, started, whole_run

TOML = (
    '[run]\nname = "demo"\nseed = 7\nrounds = 12\n\n[model]\npath = "hub/base"\n\n[[stages]]\nkind = "clip"\n'
)
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Checks that elements nest, and collects ids, elements and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id" and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text.append(data)

    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def page() -> str:
    return render_report(TOML, whole_run())


def test_it_is_sound_and_every_id_is_unique(page: str) -> None:
    parsed = Page(page)
    assert len(parsed.ids) == len(set(parsed.ids)) > 50
    used = set(re.findall(r"url\(#([^)]+)\)", page)) | set(re.findall(r'href="#([^"]+)"', page))
    assert used
    assert used <= set(parsed.ids)


def test_it_asks_for_nothing_from_outside(page: str) -> None:
    assert not re.findall(r"(?:https?|ftp|file):|//[a-z]|@import|<script|javascript:", page)
    assert all(value.startswith("#") for value in re.findall(r'\b(?:src|href)="([^"]*)"', page))
    assert "default-src 'none'" in page


def test_it_holds_the_numbers_and_the_run(page: str) -> None:
    words = Page(page).words()
    for wanted in (
        "95.1%",
        "20.9% 16.6–25.2%",  # mean of 0.16 + 0.014 * (0..7)
        "2.85 MiB",
        "2 min 12 s",
        "65,536 of 865,536 (7.6%)",
        "ab" * 32,
        "cd" * 32,
        "ef" * 32,
        "2.13.0",
        "Differential privacy none",
        "Stages clip",
        'path = "hub/base"',
        "PeftModel.from_pretrained(base, 'adapter')",
        "60.9 points better than the mean client that trained alone",
    ):
        assert wanted in words, wanted


def test_every_chart_has_words_and_is_themed(page: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 8
    for drawing in drawings:
        root = ET.fromstring(drawing)
        assert root.get("role") == "img"
        assert len(root.get("aria-label") or "") > 20
        assert len(list(root.iter("text"))) > 3
        assert root.get("width") is None
    assert not [colour for colour in COLOUR.values() if colour in page]
    style = page[page.index("<style>") : page.index("</style>")]
    assert {f"--{role}" for role in COLOUR} <= set(re.findall(r"--[a-z]+", style))


def test_hostile_client_names_stay_text() -> None:
    names = [
        "<script>alert(1)</script>",
        '" onload="alert(1)',
        "$\\frac{1}{$",
        "{{ 7*7 }}",
        "--><b>x",
        "]]>&amp;'",
        "日本語",
    ]
    page = render_report(TOML, whole_run(rounds=2, clients=names))
    parsed = Page(page)
    words = parsed.words()
    assert [name for name in names if name not in words] == []
    assert "script" not in {tag for tag, _ in parsed.elements}
    assert not [key for _, attributes in parsed.elements for key in attributes if key.startswith("on")]
    for drawing in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ET.fromstring(drawing)


def test_a_hostile_run_file_and_snippet_stay_text() -> None:
    page = render_report(
        "</code></pre><script>x</script> = [", [started()], snippet="</pre><script>y</script>"
    )
    parsed = Page(page)
    assert "script" not in {tag for tag, _ in parsed.elements}
    assert "<script>x</script>" in parsed.words()
    assert "<script>y</script>" in parsed.words()


@pytest.mark.parametrize("last", [Round(round=1), Round(round=1, evaluation=evaluation(0.3))])
def test_a_started_row_and_one_round_are_enough(last: Round) -> None:
    parsed = Page(render_report(TOML, [started(), last]))
    assert "1 of 12 rounds" in parsed.words()
    assert ("30.0%" in parsed.words()) == (last.evaluation is not None)


def test_infinite_and_missing_values_are_drawn_around() -> None:
    bad = Score(value=float("inf"), low=float("nan"), high=float("inf"), count=1)
    evaluation = Evaluation(
        scores={"exact-match": bad, "loss": bad}, clients={"exact-match": {"client-00": float("nan")}}
    )
    rows: list[Row] = [
        started(),
        Round(round=1, train_loss=float("nan"), evaluation=evaluation),
        *whole_run()[3:5],
    ]
    assert "∞" in Page(render_report(TOML, rows)).words()


def test_many_clients_and_rounds_keep_it_small() -> None:
    page = render_report(TOML, whole_run(rounds=70, clients=[f"role-{index:03d}" for index in range(45)]))
    assert len(page) < 400_000
    assert "clients, best first" in page


def test_equal_rows_give_equal_bytes_and_times_change_only_times(tmp_path: Path, page: str) -> None:
    (tmp_path / "report.html").write_text("an older report")
    rows = whole_run()
    assert write_report(tmp_path, TOML, rows).read_bytes() == page.encode()
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    later = [row.model_copy(update={"wall_s": 1000.0}) if hasattr(row, "wall_s") else row for row in rows]
    pairs = zip(render_report(TOML, later).splitlines(), page.splitlines(), strict=True)
    differing = [line for line, old in pairs if line != old]
    assert 13 < len(differing) <= 13 + 2  # thirteen rounds, the tile and the fact
    assert all("16 min 40 s" in line for line in differing)


def test_what_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"report\.html: No such file.*; check the path") as caught:
        write_report(tmp_path / "absent", TOML, [started()])
    assert "\n" not in str(caught.value)
    with pytest.raises(StateError, match="'started' row"):
        write_report(
            tmp_path,
            TOML,
            [Finished(rounds=0, adapter_digest="", bytes_up_per_client=0, bytes_down_per_client=0)],
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "toml",
    [
        "",
        '[model]\npath = "a\\"b"\ntask = "sequence-classification"\n[data]\nlabels = ["x", "y", "z"]',
        '[model]\npath = "m"\ntask = "sequence-classification"\n[data.labels]\na = 0\nb = 1\nc = 1',
    ],
)
def test_the_snippet_is_python(toml: str) -> None:
    code = load_snippet(tomllib.loads(toml))
    compile(code, "snippet", "exec")
    assert code.endswith("model = PeftModel.from_pretrained(base, 'adapter')")
    labels = re.findall(r"num_labels=(\d)", code)
    assert labels == ({"x": ["3"], "a": ["2"]}.get("x" if '"x"' in toml else "a") if toml else [])


def test_matplotlib_is_loaded_only_when_something_is_drawn() -> None:
    program = "import sys, fedpeft.reporting.html as _; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], timeout=60, check=True)
