"""Stores and objects in folders of this machine; see `shards.storage.location.Storage`."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from shards.storage import entries
from shards.storage.atomic import publish_once, replacing, temporary_path, write_temporary
from shards.storage.object_reader import ObjectReader
from shards.storage.output import OutputFile
from shards.storage.walk import WalkedEntry, walk_folder

_NO_SUCH_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
"""Errors of looking for a file that is not there, or cannot be by its name."""


class Folder:
    """Implements `shards.storage.location.Storage` for `pathlib.Path`."""

    is_remote = False

    def publish(self, path: Path, content: bytes) -> bool:
        """See `Storage.publish`."""
        return publish_once(write_temporary(path, content), path)

    def replace(self, path: Path, content: bytes) -> None:
        """See `Storage.replace`."""
        with replacing(path) as file:
            file.write(content)

    def begin_object(self, path: Path, pool: Executor, algorithm: str) -> OutputFile:
        """See `Storage.begin_object`."""
        return LocalOutput(path, pool, algorithm)

    def local_path(self, path: Path) -> Path:
        """See `local_path`."""
        return path

    def open_object(self, path: Path, *, size: int | None, read_ahead: bool) -> ObjectReader:
        """See `open_object`."""
        return LocalObject(path)

    def open_seekable(self, path: Path) -> Path:
        """See `open_seekable`: the path, once it is known to be no pipe."""
        with LocalObject(path):
            return path

    def size(self, path: Path) -> int:
        """See `Storage.size`."""
        return path.stat().st_size

    def version(self, path: Path) -> tuple[int, str]:
        """See `object_version`: the time of change, in nanoseconds."""
        status = path.stat()
        return status.st_size, str(status.st_mtime_ns)

    def children(self, root: Path) -> tuple[list[str], list[str]]:
        """See `children`."""
        try:
            with os.scandir(root) as found:
                inside = sorted(found, key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return [], []
        return [entry.name for entry in inside if entry.is_file()], [
            entry.name for entry in inside if entry.is_dir()
        ]

    def walk(self, root: Path) -> Iterator[WalkedEntry]:
        """See `Storage.walk`."""
        return walk_folder(root)

    def sizes(self, root: Path, names: Sequence[str]) -> dict[str, int]:
        """See `Storage.sizes`."""
        sizes = {}
        for name in names:
            try:
                status = (root / name).stat()
            except ValueError:  # a name with a NUL, which no file has
                continue
            except OSError as error:
                if error.errno in _NO_SUCH_FILE:
                    continue
                raise
            if stat.S_ISREG(status.st_mode):
                sizes[name] = status.st_size
        return sizes

    def can_list(self, root: Path) -> bool:
        """See `Storage.can_list`."""
        return True

    def names(self, root: Path, below: str) -> list[str]:
        """See `Storage.names`."""
        return sorted(_file_names(root, f"{below}/" if below else ""))

    def entries(self, root: Path) -> Iterator[str]:
        """See `Storage.entries`: also the names of folders without files."""
        return (inside.name for inside in root.iterdir()) if root.is_dir() else iter(())

    def read(self, path: Path) -> bytes:
        """See `Storage.read`."""
        return entries.read_regular(path)

    def require_own_files(self, root: Path) -> None:
        """See `Storage.require_own_files`."""
        entries.require_own_files(root)

    def foreign_entries(self, root: Path) -> Iterator[tuple[str, str]]:
        """See `Storage.foreign_entries`."""
        return entries.foreign_entries(root)

    def require_plain(self, root: Path, names: Iterable[str], *, follow_links: bool) -> None:
        """See `Storage.require_plain`."""
        entries.require_plain(root, names, follow_links=follow_links)

    def read_all(self, root: Path, names: Sequence[str]) -> dict[str, bytes]:
        """See `Storage.read_all`."""
        contents = {}
        for name in names:
            try:
                contents[name] = entries.read_regular(root / name)
            except FileNotFoundError:
                continue
        return contents

    def remove(self, root: Path, names: Sequence[str]) -> None:
        """See `Storage.remove`."""
        for name in names:
            (root / name).unlink(missing_ok=True)
        for folder, _, _ in os.walk(root, topdown=False):
            with suppress(OSError):  # something else is in it, or somebody else was faster
                Path(folder).rmdir()

    def move(self, root: Path, source: str, target: str) -> None:
        """See `Storage.move`."""
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        (root / source).replace(root / target)

    def link(self, source: Path, target: Path) -> bool:
        """See `Storage.link`."""
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.hardlink_to(source)
        except FileExistsError:
            return True
        except OSError:  # another device, or a file system without links
            return False
        return True

    def free_bytes(self, path: Path) -> int | None:
        """See `Storage.free_bytes`."""
        path = path.absolute()
        while not path.exists():
            path = path.parent
        return shutil.disk_usage(path).free

    def beside(self, path: Path, name: str) -> Path:
        """See `Storage.beside`."""
        return path.with_name(name)

    def require_first_creation_wins(self, root: Path) -> None:
        """See `Storage.require_first_creation_wins`: ``link`` sees to it."""


class LocalObject:
    """A file, closed when the last reference to it goes.

    Attributes:
        path: Its path.
        descriptor: The open file.
        size: Its length when it was opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor, self.size = entries.open_regular(path)

    def read(self, nbytes: int, offset: int) -> bytes:
        """See `ObjectReader.read`."""
        return os.pread(self.descriptor, nbytes, offset)

    def close(self) -> None:
        """Close it now."""
        descriptor, self.descriptor = getattr(self, "descriptor", -1), -1
        if descriptor >= 0:
            os.close(descriptor)

    __del__ = close

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class LocalOutput(OutputFile):
    """A file that is written under a temporary name beside its final one."""

    def __init__(self, final: Path, pool: Executor, algorithm: str) -> None:
        final.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = temporary_path(final)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        super().__init__(final, os.open(self._temporary, flags, 0o644), pool, algorithm, past_cache=True)
        self._final = final

    def finish(self) -> str:
        """Complete the file and flush it to the disk; returns its digest in hexadecimal digits."""
        digest = super().finish()
        begun = time.perf_counter()
        os.fsync(self._descriptor)
        self._file.seconds += time.perf_counter() - begun
        return digest

    def publish(self) -> bool:
        """See `OutputFile.publish`."""
        won = publish_once(self._temporary, self._final)
        self.discard()
        return won

    def discard(self) -> None:
        """See `OutputFile.discard`."""
        super().discard()
        self._temporary.unlink(missing_ok=True)


def _file_names(root: Path, start: str) -> Iterator[str]:
    """Yield names as `object_names`, with a call a folder and none a file: file servers take a round trip for each."""
    folders = [start]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(root / folder) as found:
                for entry in found:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(f"{folder}{entry.name}/")
                    elif not (entry.is_symlink() and os.path.isdir(entry.path)):  # noqa: PTH112 - it never raises
                        yield folder + entry.name
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue  # not there, or gone meanwhile; or not for us to see
