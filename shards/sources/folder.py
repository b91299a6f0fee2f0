"""Images in a folder: class sub-folders, or no classes at all."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from shards.errors import UsageError
from shards.sources.found import IMAGE_SUFFIXES, FoundImage
from shards.storage.location import Location
from shards.storage.remote_path import RemotePath

_LEADS_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_File = tuple[str, tuple[str, ...], int]  # address, path below the folder, bytes


def find_in_folder(root: Location) -> Iterator[FoundImage]:
    """Every image file below `root`; its class is the first folder of its path below `root`, if there is one.

    Hidden files and folders are left out; links are followed, but not to a folder that they lie in. A link that leads
    to no file is listed with 0 bytes, so that it counts as an image that is missing.

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
        yield address_of(entry.path), parts, _size_of(entry)


def _size_of(entry: "os.DirEntry[str]") -> int:
    try:
        return entry.stat().st_size
    except OSError as error:
        if error.errno in _LEADS_NOWHERE and entry.is_symlink():
            return 0
        raise


def _remote_files(root: RemotePath) -> Iterator[_File]:
    for name, nbytes in sorted(root.object_sizes().items(), key=lambda item: item[0].split("/")):
        parts = tuple(name.split("/"))
        hidden = any(part.startswith(".") for part in parts)
        if not hidden and PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES:
            yield str(root / name), parts, nbytes


def _files(
    folder: str, above: tuple[str, ...], outer: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[tuple["os.DirEntry[str]", tuple[str, ...]]]:
    """The image files below a folder, sorted; `outer` has the device and inode of the folders it lies in."""
    inside = outer | {_identity(folder)}
    with os.scandir(folder) as entries:
        listing = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda e: e.name)
    for entry in listing:
        if _is_folder(entry):
            if not (entry.is_symlink() and _identity(entry.path) in inside):
                yield from _files(entry.path, (*above, entry.name), inside)
        elif Path(entry.name).suffix.lower() in IMAGE_SUFFIXES:
            yield entry, (*above, entry.name)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno in _LEADS_NOWHERE:
            return False
        raise


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)  # noqa: PTH116 - paths here are text
    return status.st_dev, status.st_ino


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
