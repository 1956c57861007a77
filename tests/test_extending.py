"""The examples of docs/extending.md run as they stand there, and the places of a call are those it names."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def test_each_way_to_add_has_an_example() -> None:
    with_code = {heading for heading, text in SECTIONS.items() if FENCE.search(text)}
    assert with_code == {"A stage", "A strategy", "A PEFT method", "A metric, and what a task is"}
    assert set(SECTIONS) - with_code == {"A call", "A key"}


@pytest.mark.slow  # a process that imports what a run takes
def test_the_examples_run(tmp_path: Path) -> None:
    """In a process of their own, since they enter names into tables."""
    script = tmp_path / "extending.py"
    script.write_text("\n".join(FENCE.findall(PAGE)) + "\nprint('ran')\n", encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ran\n"


def test_a_call_goes_through_the_places_that_are_listed() -> None:
    places = re.findall(r"^\d\. `([^`]+)`", SECTIONS["A call"], re.MULTILINE)
    assert len(places) == 4
    assert [place for place in places if "ListAgents" not in (ROOT / place).read_text(encoding="utf-8")] == []
