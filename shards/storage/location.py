"""Where a store or one of its objects lies: a path on this machine, or a URL.

Most of the code says `root / name` and reads bytes, and does not care which it is. What is done differently for each
lies here and in `shards.storage.atomic` (publishing once), `shards.storage.output` (writing) and
`shards.storage.object_reader` (reading).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from shards.storage.parallel import in_parallel
from shards.storage.remote_path import RemotePath, is_url

Location = Path | RemotePath
"""A folder or object; `RemotePath` does what stores need of `pathlib.Path`, with the same exceptions."""


def as_location(place: str | Location) -> Location:
    """The place that a command line or a caller names.

    Raises:
        UsageError: If it is a URL that names no object store this program knows, or that holds credentials.
    """
    if isinstance(place, RemotePath):
        return place
    return RemotePath.of_url(str(place)) if is_url(str(place)) else Path(place).expanduser()


def object_sizes(root: Location, names: Iterable[str]) -> dict[str, int]:
    """Bytes of each of these objects that is there, by name."""
    if isinstance(root, RemotePath):
        return root.sizes(list(names))
    sizes = {}
    for name in names:
        try:
            sizes[name] = (root / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            continue
    return sizes


def lists_objects(root: Location) -> bool:
    """Whether `object_names` can be asked there; web servers do not list what they have."""
    return not isinstance(root, RemotePath) or root.can_list


def file_size(path: Location) -> int:
    """Bytes of an object.

    Raises:
        FileNotFoundError: If it is not there.
    """
    return path.size() if isinstance(path, RemotePath) else path.stat().st_size


def object_names(root: Location, below: str = "") -> list[str]:
    """Names inside a folder of every object in it, or in one of its folders, sorted.

    Links to folders are neither named nor followed. What goes while others are at work may be named or not.

    Args:
        root: The folder.
        below: Name of a folder in it.
    """
    if isinstance(root, RemotePath):
        return sorted(root.object_names(below))
    return sorted(_file_names(root, f"{below}/" if below else ""))


def _file_names(root: Path, start: str) -> Iterator[str]:
    """As `object_names`: a call a folder and none a file, because servers of files answer each in a journey."""
    folders = [start]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(f"{folder}{entry.name}/")
                    elif not (entry.is_symlink() and os.path.isdir(entry.path)):  # noqa: PTH112 - it never raises
                        yield folder + entry.name
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue  # not there, or gone meanwhile; or not for us to see


def read_objects(root: Location, names: Iterable[str]) -> dict[str, bytes]:
    """Content of each of these small objects that is there, by name; several at once where reading takes a journey."""
    names = list(names)

    def read(name: str) -> bytes | None:
        try:
            return (root / name).read_bytes()
        except FileNotFoundError:
            return None

    contents = in_parallel(read, names) if isinstance(root, RemotePath) else map(read, names)
    return {name: content for name, content in zip(names, contents, strict=True) if content is not None}


def remove_tree(root: Location) -> None:
    """Remove a folder and all that is in it, if it is there."""
    if isinstance(root, RemotePath):
        in_parallel(lambda name: (root / name).unlink(missing_ok=True), root.object_names())
    else:
        shutil.rmtree(root, ignore_errors=True)


def move(root: Location, source: str, target: str) -> None:
    """Give an object of a folder another name there, in place of what may bear it."""
    if isinstance(root, RemotePath):
        (root / source).replace(root / target)
    else:
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        (root / source).replace(root / target)
