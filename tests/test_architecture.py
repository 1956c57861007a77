"""Imports point one way: the house as a table, and who alone may import what."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import fedpeft
from fedpeft_client.workers.worker_process import CLIENT_APP

DEVICE_APP = "fedpeft.flower.device_app"
ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"fedpeft": ROOT / "fedpeft", "fedpeft_server": ROOT / "server", "fedpeft_client": ROOT / "client"}

# A room imports only from rooms of earlier lines; rooms of one line don't know each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("version", "errors", "v1"),
    ("plugins",),
    ("runtime", "config", "updates"),
    ("codec", "credentials", "data", "ledger", "seedspace", "workers"),
    ("adapters", "models", "wire"),
    ("aggregation", "reporting", "transport"),
    ("attacks", "privacy", "spaces"),
    ("stages", "training"),
    ("evaluation", "rounds"),
    ("compatibility", "participant"),
    ("flower", "planning"),
    ("simulation",),
    ("commands",),
    ("api", "cli_help"),
    ("cli",),
    ("__main__",),
    ("fedpeft_server", "fedpeft_client"),
)

# The rooms of the server and of the client, which import only from rooms of earlier lines too.
INNER_LAYERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "fedpeft_server": (("server_metrics",), ("store",), ("transport",), ("runs",), ("ops",)),
    "fedpeft_client": (
        ("transport", "workers"),
        ("policy",),
        ("status", "client_settings"),
        ("agent_metrics",),
        ("task_executor",),
        ("agent",),
        ("commands",),
    ),
}

DAEMONS = (
    "fedpeft_server",
    "fedpeft_client",
)  # whose commands the command line calls, once they are asked for

# A library (or a part of one), and the only places that import it; a place is a room or a file.
ONLY_IMPORTERS: dict[str, frozenset[str]] = {
    "transformers": frozenset({"models"}),
    "peft": frozenset({"models"}),
    "bitsandbytes": frozenset({"models", "fedpeft/training/eight_bit.py"}),
    "dp_accounting": frozenset({"privacy"}),
    "regex": frozenset({"fedpeft/runtime/name_patterns.py"}),
    "flwr": frozenset(
        {
            "flower",
            "transport",
            "fedpeft_server",
            "fedpeft/rounds/strategies.py",
            "fedpeft/rounds/strategy_table.py",
            "fedpeft/rounds/round_context.py",
            "fedpeft/rounds/replies.py",
            "fedpeft/rounds/cohort_rounds.py",
            "fedpeft/rounds/buffered/buffered_rounds.py",
        }
    ),
    "flwr.supercore": frozenset({"fedpeft/transport/node_identity.py"}),
    "datasets": frozenset({"data"}),
    "flwr_datasets": frozenset({"data"}),
    "fedpeft.v1": frozenset({"v1", "wire", "api", "fedpeft_server", "fedpeft_client"}),
    "matplotlib": frozenset({"reporting"}),
    "jinja2": frozenset({"reporting"}),
    "pickle": frozenset({"workers"}),
    "grpc": frozenset({"v1", "fedpeft_server", "fedpeft_client"}),
    "grpc_health": frozenset({"fedpeft_server"}),
    "grpc_reflection": frozenset({"fedpeft_server"}),
    "typer": frozenset({"cli", "cli_help"}),
    "cryptography": frozenset({"credentials"}),
    "sqlalchemy": frozenset({"fedpeft_server"}),
    "prometheus_client": frozenset({"fedpeft/runtime/telemetry.py", "fedpeft_server", "fedpeft_client"}),
}


@dataclass(frozen=True)
class Import:
    """One import: where it stands, what it names, and whether it runs when the module is loaded."""

    file: str
    line: int
    room: str
    module: str
    target: str
    on_load: bool

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line} imports {self.target}"


def room_of(module: str) -> str:
    """``fedpeft.models.base_model`` is in ``models``; the server and the client are one room each."""
    package, *rest = module.split(".")
    if package != "fedpeft":
        return package
    return rest[0] if rest else "version"


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in SOURCES.items():
        base = folder.parent if package == "fedpeft" else folder
        for path in sorted((base / package).rglob("*.py")):
            found[".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def targets(node: ast.AST, known: dict[str, Path]) -> list[str]:
    """Full names that a statement or a call of `import_module` brings in."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports hide the direction"
        assert node.module is not None
        full = [f"{node.module}.{alias.name}" for alias in node.names]
        of_ours = [name for name in full if name in known]
        return of_ours if node.module == "fedpeft" and of_ours else [node.module, *of_ours]
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
        "import_module",
        "__import__",
    ):
        first = node.args[0] if node.args else None
        return [first.value] if isinstance(first, ast.Constant) and isinstance(first.value, str) else []
    return []


def imports() -> Iterator[Import]:
    known = modules()
    for module, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        late = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            for target in targets(node, known):
                yield Import(
                    path.relative_to(ROOT).as_posix(),
                    getattr(node, "lineno", 0),
                    room_of(module),
                    module,
                    target,
                    on_load=id(node) not in late,
                )


IMPORTS = tuple(imports())


def ours(item: Import) -> bool:
    return item.target.split(".")[0] in SOURCES


def test_the_walk_finds_the_house() -> None:
    """Guards the other tests against an empty list."""
    assert len(IMPORTS) > 500
    assert any(item.room == "cli" and room_of(item.target) == "commands" for item in IMPORTS)


def test_every_room_has_its_place_in_the_table() -> None:
    table = [room for layer in LAYERS for room in layer]
    assert len(table) == len(set(table))
    assert set(table) == {room_of(module) for module in modules()}


def test_imports_point_one_way() -> None:
    height = {room: level for level, layer in enumerate(LAYERS) for room in layer}
    wrong = [
        f"{item.place} ({item.room} may not know {room_of(item.target)})"
        for item in IMPORTS
        if ours(item)
        and room_of(item.target) != item.room
        and height.get(room_of(item.target), 0) >= height.get(item.room, len(LAYERS))
        and not (item.room in ("api", "cli") and not item.on_load and room_of(item.target) in DAEMONS)
    ]
    assert wrong == []


@pytest.mark.parametrize("package", sorted(INNER_LAYERS))
def test_imports_of_the_server_and_the_client_point_one_way(package: str) -> None:
    layers = INNER_LAYERS[package]
    height = {room: level for level, layer in enumerate(layers) for room in layer}
    inner = {name: parts[1] for name in modules() if (parts := name.split("."))[0] == package and parts[1:]}
    assert set(inner.values()) == set(height)
    wrong = [
        item.place
        for item in IMPORTS
        if item.module in inner
        and (target := item.target.split("."))[0] == package
        and target[1:]
        and target[1] != inner[item.module]
        and height[target[1]] >= height[inner[item.module]]
    ]
    assert wrong == []


@pytest.mark.parametrize("library", sorted(ONLY_IMPORTERS))
def test_only_importers(library: str) -> None:
    wrong = [
        item.place
        for item in IMPORTS
        if f"{item.target}.".startswith(f"{library}.")
        and not {item.room, item.file} & ONLY_IMPORTERS[library]
    ]
    assert wrong == []


# What reads files that a run file names, or fetches data by name: an agent must not be able to get there.
LOADERS_OF_RUN_FILES = (
    "fedpeft.data.hub",
    "fedpeft.data.run_sources",
    "fedpeft.data.run_tables",
    "fedpeft.flower.client_app",
    "fedpeft.participant.load_simulation",
    "fedpeft.participant.load_server",
    "fedpeft.simulation",
    "fedpeft.commands",
    "fedpeft_server",
)


def reached_from(*starts: str) -> set[str]:
    """Modules that these import, now or in a function, and what those import."""
    known = modules()
    graph: dict[str, set[str]] = {module: set() for module in known}
    for item in IMPORTS:
        if ours(item):
            parts = item.target.split(".")
            packages = {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
            graph[item.module] |= packages & known.keys()
    found, left = set(starts), list(starts)
    while left:
        fresh = graph[left.pop()] - found
        found |= fresh
        left.extend(fresh)
    return found


def test_an_agent_cannot_reach_what_reads_the_files_of_a_run_file() -> None:
    """The package of agents, and the app that its worker looks up by name."""
    assert f"{DEVICE_APP}:app" == CLIENT_APP
    agent = [module for module in modules() if room_of(module) == "fedpeft_client"]
    reached = reached_from(*agent, DEVICE_APP)
    assert {
        "fedpeft.participant.load_device",
        "fedpeft.participant.loaded_run",
        "fedpeft.data.tables",
    } <= reached
    wrong = [
        module
        for module in reached
        if any(f"{module}.".startswith(f"{loader}.") for loader in LOADERS_OF_RUN_FILES)
    ]
    assert wrong == []
    assert set(LOADERS_OF_RUN_FILES) & reached_from("fedpeft.cli"), "the walk finds them where they are"


def test_no_module_needs_itself_to_load() -> None:
    graph: dict[str, set[str]] = {module: set() for module in modules()}
    for item in IMPORTS:
        if item.on_load and item.target in graph and item.target != item.module:
            graph[item.module].add(item.target)
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the cycle


def test_the_command_line_starts_without_heavy_libraries() -> None:
    loaded = {
        item.target.split(".")[0] for item in IMPORTS if item.room in ("cli", "errors") and item.on_load
    }
    assert loaded <= {
        "__future__",
        "collections",
        "os",
        "pathlib",
        "signal",
        "sys",
        "typing",
        "click",
        "typer",
        "fedpeft",
    }


def test_global_generators_are_seeded_only_where_they_are_restored() -> None:
    """Dropout draws from torch's global generator, so it is seeded inside ``fork_rng``; nothing else is."""
    seeds = ("torch.manual_seed", "np.random.seed", "numpy.random.seed", "random.seed", "set_seed")
    wrong, right = [], 0
    for path in modules().values():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        restored = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.With) and any("fork_rng" in ast.unparse(item) for item in node.items)
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in seeds:
                right += id(node) in restored
                if id(node) not in restored:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert wrong == []
    assert right, "the walk no longer sees how training seeds dropout"


# Scripts that time, weigh or take apart an inner part, which the public API does not give.
SCRIPTS_OF_INNER_PARTS = frozenset(
    {
        "bench_codec",
        "bench_engine",
        "bench_federation",
        "bench_gpu_memory",
        "bench_memory",
        "bench_seed_space",
        "compare_zeroth",  # the table of rules, for passes and what replays
        "federation_load",
        "pretrain_embedded",
        "quality_async",  # the virtual clock's speeds
        "quality_byzantine",  # a frozen encoder's features
        "quality_merge",
        "quality_privacy",  # the accountant, to spend one epsilon by every method
        "quality_seed_space",
        "results_table",
        "scaling",
        "soak",
    }
)


def test_scripts_use_the_public_api_alone() -> None:
    """All but those listed; one that no longer needs its place in the list loses it."""
    public = {name for name in fedpeft.__all__ if not name.startswith("_")}
    inner = set()
    for path in sorted((ROOT / "simulations").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0].startswith("fedpeft"):
                named = {alias.name for alias in node.names}
                if node.module != "fedpeft" or not named <= public:
                    inner.add(path.stem)
            elif isinstance(node, ast.Import):
                names = {alias.name for alias in node.names if alias.name.startswith("fedpeft")}
                if names - {"fedpeft"}:
                    inner.add(path.stem)
    assert inner == SCRIPTS_OF_INNER_PARTS
