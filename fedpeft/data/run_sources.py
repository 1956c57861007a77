"""From what a run file calls its data to parts that can be read: files, or data sets of the hub.

For run files of one's own: whatever file they name is read. An agent reads its owner's rows through
`fedpeft.data.sources` alone.
"""

from __future__ import annotations

from fedpeft.data.hub import PREFIX, parse_hub_source, read_hub
from fedpeft.data.sources import Part, find_files
from fedpeft.data.text_files import Reading
from fedpeft.errors import DataError


def find_parts(
    source: str | tuple[str, ...], reading: Reading | None = None, *, split: str = "train"
) -> tuple[Part, ...]:
    """The parts of a file, a folder, a glob pattern, a ``datasets:`` name, or a list of these.

    Args:
        reading, split: see `find_files`.

    Raises:
        DataError: nothing is there, a file's suffix has no reader, or the name is none of a data set.
    """
    sources = (source,) if isinstance(source, str) else source
    parts = tuple(part for item in sources for part in _parts(item, reading, split))
    if not parts:
        raise DataError("the list of data files is empty; name at least one file")
    return parts


def _parts(source: str, reading: Reading | None, split: str) -> list[Part]:
    if not source.startswith(PREFIX):
        return find_files(source, reading, split=split)
    name = parse_hub_source(source)[0]
    return [Part(name, source, lambda: read_hub(source))]
