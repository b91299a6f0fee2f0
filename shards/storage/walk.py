"""Every file below a folder of this machine, links followed: what a source of images is listed by.

Links to folders that they are in are left out, so that the walk ends.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shards.storage.entries import open_if_regular

_LEADS_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES)


class WalkedEntry(Protocol):
    """A file or folder that `shards.storage.location.Storage.walk` has met."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Its path below the folder that is walked."""

    @property
    def path(self) -> str:
        """Its whole path or URL."""

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder; servers have none."""

    @property
    def is_outside(self) -> bool:
        """Whether it is a link that leads out of the folder that is walked."""

    def size(self) -> int | None:
        """Return the file's size in bytes; 0 of a link that leads nowhere, None of a pipe, socket or device."""

    def head(self, nbytes: int) -> bytes:
        """Return the first bytes of the file; nothing where they cannot be read, or only by a request to a server."""


def walk_folder(root: Path) -> Iterator[WalkedEntry]:
    """Yield what is in a folder at any depth, by name; a folder that begins with a dot is not entered."""
    top = str(root.absolute())
    return _walked(top, (), os.path.realpath(top), frozenset())


def _walked(
    folder: str, above: tuple[str, ...], root: str, outer: frozenset[tuple[int, int]]
) -> Iterator[WalkedEntry]:
    """Yield a folder's entries; `outer` has the device and inode of the folders it is in."""
    inside = outer | {_identity(folder)}
    with os.scandir(folder) as entries:
        listing = sorted(entries, key=lambda entry: entry.name)
    for entry in listing:
        is_hidden = entry.name.startswith(".")
        is_folder = not is_hidden and _is_folder(entry)
        if is_folder and entry.is_symlink() and _identity(entry.path) in inside:
            continue
        parts = (*above, entry.name)
        yield _LocalEntry(entry, parts, is_folder, root)
        if is_folder:
            yield from _walked(entry.path, parts, root, inside)


@dataclass(frozen=True, slots=True)
class _LocalEntry:
    entry: os.DirEntry[str]
    parts: tuple[str, ...]
    is_folder: bool
    root: str

    @property
    def path(self) -> str:
        return self.entry.path

    @property
    def is_outside(self) -> bool:
        if not self.entry.is_symlink():
            return False
        target = os.path.realpath(self.entry.path)
        return target != self.root and not target.startswith(self.root.rstrip("/") + "/")

    def size(self) -> int | None:
        try:
            status = self.entry.stat()
        except OSError as error:
            if error.errno in _LEADS_NOWHERE and self.entry.is_symlink():
                return 0
            raise
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def head(self, nbytes: int) -> bytes:
        try:
            opened = open_if_regular(Path(self.entry.path))
            if opened is None:
                return b""
            try:
                return os.read(opened[0], nbytes)
            finally:
                os.close(opened[0])
        except OSError:
            return b""


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno in _LEADS_NOWHERE:
            return False
        raise


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)  # noqa: PTH116 - paths here are text
    return status.st_dev, status.st_ino
