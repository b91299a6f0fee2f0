"""Images in a folder: class sub-folders, or no classes at all."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from pipeline.sources.listing import IMAGE_SUFFIXES, FoundImage
from shards.errors import UsageError
from shards.location import Location
from shards.remote.path import RemotePath

_File = tuple[str, tuple[str, ...], int]  # address, path below the folder, bytes


def find_in_folder(root: Location) -> Iterator[FoundImage]:
    """Every image file below `root`; its class is the first folder of its path below `root`, if there is one.

    Hidden files and folders are left out; links are followed.

    Raises:
        UsageError: If some images lie in class folders and some beside them.
    """
    loose: str | None = None
    classed: str | None = None
    files = _remote_files(root) if isinstance(root, RemotePath) else _local_files(root)
    for address, parts, nbytes in files:
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
            uri=address,
            offset=0,
            nbytes=nbytes,
        )


def _local_files(root: Path) -> Iterator[_File]:
    for entry, parts in _files(str(root.absolute()), ()):
        yield address_of(entry.path), parts, entry.stat().st_size


def _remote_files(root: RemotePath) -> Iterator[_File]:
    for name, nbytes in sorted(root.object_sizes().items(), key=lambda item: item[0].split("/")):
        parts = tuple(name.split("/"))
        hidden = any(part.startswith(".") for part in parts)
        if not hidden and PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES:
            yield str(root / name), parts, nbytes


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


def whole_address(path: Location) -> str:
    """A place as text that means the same in every working folder, and that any file can hold."""
    return str(path) if isinstance(path, RemotePath) else address_of(str(path.absolute()))


def address_of(path: str) -> str:
    """A local path as text that any file can hold; a name that is not UTF-8 becomes a `file://` address."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return "file://" + quote(os.fsencode(path))
    return path
