"""Where a store or one of its objects lies: a path on this machine, or a URL.

Most of the code says ``root / name`` and reads bytes, and does not care which it is. What is done differently for each
is a member of `Storage`, which `shards.storage.folder` and `shards.storage.server` implement. Rows of stores on this
machine are read past all of it, by `shards.reading.shard_file`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from functools import cache
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeVar

from shards.storage.atomic import is_temporary
from shards.storage.remote_path import RemotePath, is_url

if TYPE_CHECKING:
    from shards.storage.object_reader import ObjectReader
    from shards.storage.output import OutputFile
    from shards.storage.walk import WalkedEntry

Location = Path | RemotePath
"""A folder or object; `RemotePath` does what stores need of `pathlib.Path`, with the same exceptions."""

L = TypeVar("L", contravariant=True)


class Storage(Protocol[L]):
    """What folders of this machine and servers do each in their own way; ``L`` is their kind of path."""

    is_remote: bool
    """Whether each request takes a round trip to a server."""

    def publish(self, path: L, content: bytes) -> bool:
        """Write an object, whole, unless its name is taken; says whether it was free."""

    def replace(self, path: L, content: bytes) -> None:
        """Write an object in place of what may be there; a reader sees the old one or the new one, whole."""

    def begin_object(self, path: L, pool: Executor, algorithm: str) -> OutputFile:
        """Begin an object that is written from front to back; hashing and flushing may be done in ``pool``."""

    def local_path(self, path: L) -> Path | None:
        """See `local_path`."""

    def open_object(self, path: L, *, size: int | None, read_ahead: bool) -> ObjectReader:
        """See `open_object`."""

    def open_seekable(self, path: L) -> Path | IO[bytes]:
        """See `open_seekable`."""

    def size(self, path: L) -> int:
        """Return the size of an object in bytes.

        Raises:
            FileNotFoundError: If it is not there.
        """

    def version(self, path: L) -> tuple[int, str]:
        """See `object_version`."""

    def children(self, root: L) -> tuple[list[str], list[str]]:
        """See `children`."""

    def walk(self, root: L) -> Iterator[WalkedEntry]:
        """Yield what is in a folder at any depth, by name; a folder that begins with a dot need not be entered."""

    def sizes(self, root: L, names: Sequence[str]) -> dict[str, int]:
        """Return the bytes of each of these objects that is there, by name."""

    def can_list(self, root: L) -> bool:
        """Return whether `names` and `entries` can be asked; web servers do not list what they have."""

    def names(self, root: L, below: str) -> list[str]:
        """See `object_names`."""

    def entries(self, root: L) -> Iterator[str]:
        """Return the last parts of the names of what is in a folder; nothing if it is not there."""

    def read(self, path: L) -> bytes:
        """See `read_object`."""

    def require_own_files(self, root: L) -> None:
        """See `require_own_files`."""

    def foreign_entries(self, root: L) -> Iterator[tuple[str, str]]:
        """See `foreign_entries`."""

    def require_plain(self, root: L, names: Iterable[str], *, follow_links: bool) -> None:
        """See `require_plain`."""

    def read_all(self, root: L, names: Sequence[str]) -> dict[str, bytes]:
        """Return the content of each of these small objects that is there, by name."""

    def remove(self, root: L, names: Sequence[str]) -> None:
        """Remove files of a folder that may be there, and the folders that are empty then, its own included."""

    def move(self, root: L, source: str, target: str) -> None:
        """Give an object of a folder another name there, in place of what may bear it."""

    def link(self, source: L, target: L) -> bool:
        """Give an object a second name unless that is taken; False where that cannot be done."""

    def free_bytes(self, path: L) -> int | None:
        """Return how many bytes can still be written where ``path`` is, or will be; None where that is not known."""

    def beside(self, path: L, name: str) -> Path:
        """Return a path of this machine for what belongs to a store and is no part of it, such as logs."""

    def require_first_creation_wins(self, root: L) -> None:
        """Find out whether an object that is there can be created again.

        Raises:
            UsageError: If it can.
        """


def storage_of(path: Location) -> Storage[Any]:
    """Return the implementation of `Storage` for a location."""
    return _server() if isinstance(path, RemotePath) else _folder()


# Imported when they are used: commands that only parse a location need neither.
@cache
def _folder() -> Storage[Path]:
    from shards.storage.folder import Folder

    return Folder()


@cache
def _server() -> Storage[RemotePath]:
    from shards.storage.server import Server

    return Server()


def as_location(place: str | Location) -> Location:
    """Return the location that a command line or a caller names.

    Raises:
        UsageError: If it is a URL that names no object store this program knows, or that holds credentials.
    """
    if isinstance(place, RemotePath):
        return place
    return RemotePath.of_url(str(place)) if is_url(str(place)) else Path(place).expanduser()


def publish_bytes(final: Location, content: bytes) -> bool:
    """Write ``content`` as ``final`` unless that name is taken; says whether it was free."""
    return storage_of(final).publish(final, content)


def replace_atomically(final: Location, content: bytes) -> None:
    """Write ``content`` as ``final``; a reader sees the old object or the new one, whole."""
    storage_of(final).replace(final, content)


def begin_object(final: Location, pool: Executor, algorithm: str) -> OutputFile:
    """Begin an object that is written from front to back and then published; see `OutputFile`."""
    return storage_of(final).begin_object(final, pool, algorithm)


def local_path(path: Location) -> Path | None:
    """Return the path of a folder or file of this machine; None on a server."""
    return storage_of(path).local_path(path)


def open_object(path: Location, *, size: int | None = None, read_ahead: bool = True) -> ObjectReader:
    """Open an object to be read at any offset; several threads may read it at once.

    Args:
        path: The object.
        size: Its length, if it is known, which saves a server being asked.
        read_ahead: Expect reads mostly from front to back: a server is asked for whole blocks, and the last is kept.

    Raises:
        FileNotFoundError: If it is not there.
        StoreDamagedError: If it is no regular file.
    """
    return storage_of(path).open_object(path, size=size, read_ahead=read_ahead)


def open_seekable(path: Location) -> Path | IO[bytes]:
    """Return what a library reads an object through at any offset: a path that it opens by itself, or an open file.

    Raises:
        FileNotFoundError: If it is not there.
        StoreDamagedError: If it is no regular file.
    """
    return storage_of(path).open_seekable(path)


def object_sizes(root: Location, names: Iterable[str]) -> dict[str, int]:
    """Return the bytes of each of these objects that is there, by name."""
    return storage_of(root).sizes(root, list(names))


def lists_objects(root: Location) -> bool:
    """Return whether `object_names` can be asked there; web servers do not list what they have."""
    return storage_of(root).can_list(root)


def file_size(path: Location) -> int:
    """Return the size of an object in bytes.

    Raises:
        FileNotFoundError: If it is not there.
    """
    return storage_of(path).size(path)


def object_version(path: Location) -> tuple[int, str]:
    """Return the bytes of an object, and a text that is another once it is rewritten: a time, or the server's tag.

    The text is empty where a server says nothing.

    Raises:
        FileNotFoundError: If it is not there.
    """
    return storage_of(path).version(path)


def children(root: Location) -> tuple[list[str], list[str]]:
    """Return the names of the files and of the folders in a folder, sorted; links are followed, pipes left out.

    Nothing if it is not there.
    """
    return storage_of(root).children(root)


def object_names(root: Location, below: str = "") -> list[str]:
    """Return names inside a folder of every object in it, or in one of its folders, sorted.

    Links to folders are neither named nor followed. What goes while others are at work may be named or not.

    Args:
        root: The folder.
        below: Name of a folder in it.
    """
    return storage_of(root).names(root, below)


def read_object(path: Location) -> bytes:
    """Return the content of one small object.

    Raises:
        FileNotFoundError: If it is not there.
        StoreDamagedError: If it is no regular file.
    """
    return storage_of(path).read(path)


def require_own_files(root: Location) -> None:
    """Refuse a folder to write into that holds links; see `shards.storage.entries.require_own_files`."""
    storage_of(root).require_own_files(root)


def foreign_entries(root: Location) -> Iterator[tuple[str, str]]:
    """Return links and the like in a folder; see `shards.storage.entries.foreign_entries`."""
    return storage_of(root).foreign_entries(root)


def require_plain(root: Location, names: Iterable[str], *, follow_links: bool) -> None:
    """Refuse objects to read that are behind links; see `shards.storage.entries.require_plain`."""
    storage_of(root).require_plain(root, names, follow_links=follow_links)


def read_objects(root: Location, names: Iterable[str]) -> dict[str, bytes]:
    """Return the content of each of these small objects that is there, by name."""
    return storage_of(root).read_all(root, list(names))


def remove_matching(root: Location, pattern: re.Pattern[str]) -> None:
    """Remove what a program of ours has written into a folder, and the folder if nothing else is in it.

    Links are not followed.

    Args:
        root: The folder, which need not be there.
        pattern: Of the whole names, in the folder, of files to remove; temporary files go too.
    """
    names = object_names(root)
    own = [name for name in names if pattern.fullmatch(name) or is_temporary(PurePosixPath(name))]
    storage_of(root).remove(root, own)


def move(root: Location, source: str, target: str) -> None:
    """Give an object of a folder another name there, in place of what may bear it."""
    storage_of(root).move(root, source, target)


def beside(path: Location, name: str) -> Path:
    """Return a local path for what belongs to a store and is no part of it: beside it, or in the working folder."""
    return storage_of(path).beside(path, name)


def free_bytes(path: Location) -> int | None:
    """Return how many bytes can still be written where ``path`` is, or will be; None on a server (not known)."""
    return storage_of(path).free_bytes(path)
