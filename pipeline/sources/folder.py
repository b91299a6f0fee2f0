"""Images in a folder: class sub-folders, or no classes at all."""

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from pipeline.sources.listing import IMAGE_SUFFIXES, FoundImage
from shards.errors import UsageError


def find_in_folder(root: Path) -> Iterator[FoundImage]:
    """Every image file below `root`; its class is the first folder of its path below `root`, if there is one.

    Hidden files and folders are left out; links are followed.

    Raises:
        UsageError: If some images lie in class folders and some beside them.
    """
    loose: str | None = None
    classed: str | None = None
    for entry, parts in _files(str(root.absolute()), ()):
        name = "/".join(parts)
        if len(parts) == 1:
            loose = loose or name
        else:
            classed = classed or name
        if loose and classed:
            raise UsageError(
                "images must lie either all in class sub-folders or all in the folder itself, "
                f"got {loose} beside {classed}; move or remove one kind"
            )
        yield FoundImage(
            key=printable(name),
            class_name=printable(parts[0]) if len(parts) > 1 else None,
            uri=address_of(entry.path),
            offset=0,
            nbytes=entry.stat().st_size,
        )


def _files(folder: str, above: tuple[str, ...]) -> Iterator[tuple["os.DirEntry[str]", tuple[str, ...]]]:
    with os.scandir(folder) as entries:
        listing = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda e: e.name)
    for entry in listing:
        if entry.is_dir():
            yield from _files(entry.path, (*above, entry.name))
        elif Path(entry.name).suffix.lower() in IMAGE_SUFFIXES:
            yield entry, (*above, entry.name)


def printable(name: str) -> str:
    r"""A file name as text that any file can hold; bytes that are not UTF-8 become `\\xNN`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def address_of(path: str) -> str:
    """A local path as text that any file can hold; a name that is not UTF-8 becomes a `file://` address."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return "file://" + quote(os.fsencode(path))
    return path
