"""Nothing that arrives is unpickled, evaluated or run as a template: the calls that could, and where."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_architecture import ROOT, modules

# Imports that bring a reader which builds any object its input names. `pickle` has its place in the table of
# test_architecture.py: our own worker processes, through pipes that nobody else holds.
READERS = ("marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "ruamel", "jsonpickle")


def found(source: str) -> Iterator[str]:
    """What in a module's text could run what it is given."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from _imports(node)
        elif isinstance(node, ast.Call):
            yield from _calls(node)


def _imports(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    names = [alias.name for alias in node.names]
    modules = names if isinstance(node, ast.Import) else [node.module or ""]
    yield from (f"import {name}" for name in modules if name.split(".")[0] in READERS)
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jinja2":
        yield from (f"jinja2's {name}" for name in names if name not in ("Environment", "StrictUndefined"))


def _calls(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    given = {word.arg: ast.unparse(word.value) for word in node.keywords if word.arg}
    if name in ("eval", "exec", "compile", "os.system", "os.popen"):
        yield name
    if name == "torch.load" and given.get("weights_only") != "True":
        yield "torch.load without weights_only"
    if name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
        yield "np.load with allow_pickle"
    if given.get("shell", "False") != "False":
        yield "a shell"
    if given.get("trust_remote_code", "False") != "False":
        yield "code that lies beside a model"
    if name.split(".")[-1] in ("Environment", "NativeEnvironment") and given.get("autoescape") != "True":
        yield "a template that does not escape"
    if name in ("jinja2.Template", "jinja2.nativetypes.NativeTemplate"):
        yield "a template that does not escape"


SAMPLES = {
    "import yaml": "import yaml",
    "from cloudpickle import loads": "import cloudpickle",
    "eval(text)": "eval",
    "torch.load(path)": "torch.load without weights_only",
    "torch.load(path, weights_only=False)": "torch.load without weights_only",
    "np.load(path, allow_pickle=True)": "np.load with allow_pickle",
    "subprocess.run(text, shell=True)": "a shell",
    "AutoModel.from_pretrained(path, trust_remote_code=trusted)": "code that lies beside a model",
    "jinja2.Environment()": "a template that does not escape",
    "jinja2.Template(text)": "a template that does not escape",
    "from jinja2 import Template": "jinja2's Template",
}


@pytest.mark.parametrize("source", sorted(SAMPLES))
def test_the_walk_sees_it(source: str) -> None:
    assert SAMPLES[source] in list(found(source))


@pytest.mark.parametrize("source", ["model.eval()", "torch.load(path, weights_only=True)", "np.load(path)"])
def test_the_walk_does_not_see_what_is_not_there(source: str) -> None:
    assert list(found(source)) == []


def test_no_module_of_ours_could_run_what_it_is_given() -> None:
    paths: list[Path] = list(modules().values())
    assert len(paths) > 150
    wrong = [
        f"{path.relative_to(ROOT)}: {what}"
        for path in paths
        for what in found(path.read_text(encoding="utf-8"))
    ]
    assert wrong == []
