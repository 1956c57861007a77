"""Putting the example plugin where Python finds it, as an installation would, without a network."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

SOURCE = Path(__file__).parent / "example_plugin"


def install_example(folder: Path, *, version: str = "1.0", change: str = "") -> Path:
    """Lay the example package with its metadata into a folder; returns the folder, for `sys.path`.

    Args:
        version: that its metadata state.
        change: text that is added to its module, so that its digest is another.
    """
    project = tomllib.loads((SOURCE / "pyproject.toml").read_text())["project"]
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(SOURCE / "fedpeft_example.py", folder)
    with (folder / "fedpeft_example.py").open("a", encoding="utf-8") as module:
        module.write(change)
    metadata = folder / f"fedpeft_example-{version}.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {version}\n"
    )
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in entries.items()), ""]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    return folder
