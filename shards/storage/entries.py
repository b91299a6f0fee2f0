"""What may be in a folder that others made: folders and regular files, and no links unless they are asked for.

A store or run folder may come from a stranger. A link in it would lead what is written, removed or read to another
place of this machine; a device or a pipe would never end. Whoever writes looks through the folder first and refuses
one that holds any of these; whoever reads a finished store looks at the objects that its manifest names.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from shards.errors import StoreDamagedError, UsageError

LARGEST_SMALL_OBJECT = 4 << 30
"""Bytes of the largest object that is read whole: plan, index and documents."""


def require_own_files(root: Path, *, foreign: tuple[str, ...] = ()) -> None:
    """Refuse a folder to write into that holds, at any depth, a link or what is neither folder nor file.

    Args:
        root: The folder; it may be a link itself, and need not be there.
        foreign: Folders of it that other programs keep, which may hold links.

    Raises:
        UsageError: Naming the first that was found.
    """
    for name, what in foreign_entries(root):
        if "/" in name and name.startswith(foreign):
            continue
        raise UsageError(
            f"{root / name} is {what}; nothing is written or removed through it, put the files themselves there"
        )


def foreign_entries(root: Path) -> Iterator[tuple[str, str]]:
    """Find what is neither a folder nor a regular file in a folder, at any depth: its name there and its kind.

    Links are not followed.
    """
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(f"{folder}{entry.name}/")
                    elif not entry.is_file(follow_symlinks=False) and os.path.lexists(entry.path):
                        what = "a link" if entry.is_symlink() else "no regular file"
                        yield f"{folder}{entry.name}", what
        except (FileNotFoundError, NotADirectoryError):
            continue  # gone meanwhile: others may be at work


def require_plain(root: Path, names: Iterable[str], *, follow_links: bool) -> None:
    """Refuse objects of a folder that are behind a link or are no regular files; those that are missing pass.

    Args:
        root: The folder; it may be a link itself.
        names: Paths of the objects in it.
        follow_links: Allow links, to regular files alone.

    Raises:
        UsageError: Naming the first that was found.
    """
    look = Path.stat if follow_links else Path.lstat
    seen = {"": stat.S_IFDIR}
    for name in names:
        end = 0
        while end < len(name):
            end = name.find("/", end + 1) % (len(name) + 1)  # behind the last part: the whole name
            part = name[:end]
            if part not in seen:
                try:
                    seen[part] = stat.S_IFMT(look(root / part).st_mode)
                except (FileNotFoundError, NotADirectoryError):
                    seen[part] = 0
            if seen[part] == stat.S_IFLNK:
                raise UsageError(
                    f"{root / part} is a link to another place; add --follow-links if you made it on purpose"
                )
        if seen[name] not in (0, stat.S_IFREG):
            raise UsageError(f"{root / name} is not a regular file; restore it")


def open_regular(path: Path) -> tuple[int, int]:
    """Open a regular file for reading, which a device, a pipe or a link to one is not.

    Returns:
        Its descriptor and its length in bytes.

    Raises:
        FileNotFoundError: If it is not there.
        StoreDamagedError: If it is something else.
    """
    opened = open_if_regular(path)
    if opened is None:
        raise StoreDamagedError(f"{path} is not a regular file; restore it")
    return opened


def open_if_regular(path: Path) -> tuple[int, int] | None:
    """Return descriptor and length in bytes of a regular file; None if it is something else, which is not waited for.

    Raises:
        OSError: If it cannot be opened.
    """
    if "\0" in str(path):  # no name of a file, but of what a list or plan may say
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    # Without O_NONBLOCK, opening a pipe waits for its writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        return None
    return descriptor, found.st_size


def read_regular(path: Path) -> bytes:
    """Return the content of a regular file of at most `LARGEST_SMALL_OBJECT` bytes.

    Raises:
        FileNotFoundError: If it is not there.
        StoreDamagedError: If it is no regular file, or larger.
    """
    descriptor, size = open_regular(path)
    with open(descriptor, "rb") as file:  # noqa: PTH123 - of a descriptor
        if size > LARGEST_SMALL_OBJECT:
            raise StoreDamagedError(
                f"{path} has {size:,} bytes, and is read whole up to {LARGEST_SMALL_OBJECT:,}; restore it"
            )
        return file.read(size)
