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
    yield from _loads(node, name, given)
    if name.split(".")[-1] in ("Environment", "NativeEnvironment") and given.get("autoescape") != "True":
        yield "a template that does not escape"
    if name in ("jinja2.Template", "jinja2.nativetypes.NativeTemplate"):
        yield "a template that does not escape"


def _loads(node: ast.Call, name: str, given: dict[str, str]) -> Iterator[str]:
    """Calls into transformers, peft, datasets and torch that can bring in code or pickles."""
    owner, _, method = name.rpartition(".")
    if given.get("trust_remote_code", "False") != "False":
        yield "code that lies beside a model"
    elif owner not in WITHOUT_CODE and method in ASK_FOR_CODE and "trust_remote_code" not in given:
        yield f"{method} that may ask for code"  # left out, transformers asks on the terminal
    if (
        method == "from_pretrained"
        and owner not in WITHOUT_WEIGHTS
        and given.get("use_safetensors") != "True"
    ):
        yield "weights that may be a pickle"
    if method == "load_dataset" and not (node.args and ast.unparse(node.args[0]).startswith("f'{_HUB}{")):
        yield "a data set that may be a folder or a loader's name"
    if method in NEVER or name in NEVER:
        yield f"{method}, which loads code or pickles"


ASK_FOR_CODE = ("from_pretrained", "from_config", "generate")
# Configurations and tokenizers are JSON; an adapter's folder is checked before peft reads it.
WITHOUT_CODE = ("", "GenerationConfig", "peft.PeftModel")
WITHOUT_WEIGHTS = ("AutoConfig", "AutoTokenizer", "GenerationConfig", "peft.PeftModel")
NEVER = (
    "pipeline",
    "get_kernel",
    "get_class_from_dynamic_module",
    "custom_object_save",
    "load_from_disk",
    "load_dataset_builder",
    "read_pickle",
    "from_pickle",
    "load_peft_weights",
    "load_adapter_model",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "torch.hub.load",
    "torch.jit.load",
    "torch.export.load",
    "torch.package.PackageImporter",
)


SAMPLES = {
    "import yaml": "import yaml",
    "from cloudpickle import loads": "import cloudpickle",
    "eval(text)": "eval",
    "torch.load(path)": "torch.load without weights_only",
    "torch.load(path, weights_only=False)": "torch.load without weights_only",
    "np.load(path, allow_pickle=True)": "np.load with allow_pickle",
    "subprocess.run(text, shell=True)": "a shell",
    "AutoModel.from_pretrained(path, trust_remote_code=trusted)": "code that lies beside a model",
    "AutoConfig.from_pretrained(path)": "from_pretrained that may ask for code",
    "kind.from_config(config)": "from_config that may ask for code",
    "model.generate(input_ids)": "generate that may ask for code",
    "kind.from_pretrained(path, trust_remote_code=False)": "weights that may be a pickle",
    "peft.PeftModel.from_pretrained(base, x, trust_remote_code=True)": "code that lies beside a model",
    "datasets.load_dataset(name)": "a data set that may be a folder or a loader's name",
    "datasets.load_dataset(f'{name}')": "a data set that may be a folder or a loader's name",
    "transformers.pipeline('text-generation')": "pipeline, which loads code or pickles",
    "torch.jit.load(path)": "load, which loads code or pickles",
    "jinja2.Environment()": "a template that does not escape",
    "jinja2.Template(text)": "a template that does not escape",
    "from jinja2 import Template": "jinja2's Template",
}


@pytest.mark.parametrize("source", sorted(SAMPLES))
def test_the_walk_sees_it(source: str) -> None:
    assert SAMPLES[source] in list(found(source))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "torch.load(path, weights_only=True)",
        "np.load(path)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=False)",
        "kind.from_pretrained(path, trust_remote_code=False, use_safetensors=True)",
        "datasets.load_dataset(f'{_HUB}{name}', config)",
    ],
)
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
