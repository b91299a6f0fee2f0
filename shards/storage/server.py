"""Stores and objects on servers; see `shards.storage.location.Storage`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from shards.storage.object_reader import BLOCK_NBYTES, ObjectReader
from shards.storage.output import OutputFile
from shards.storage.parallel import in_parallel
from shards.storage.remote_path import RemotePath
from shards.storage.walk import WalkedEntry


class Server:
    """Implements `shards.storage.location.Storage` for `RemotePath`: requests that wait are made side by side."""

    is_remote = True

    def publish(self, path: RemotePath, content: bytes) -> bool:
        """See `Storage.publish`: the server refuses a name that is taken."""
        return path.create(content)

    def replace(self, path: RemotePath, content: bytes) -> None:
        """See `Storage.replace`: a server shows an object whole or not at all."""
        path.write_bytes(content)

    def begin_object(self, path: RemotePath, pool: Executor, algorithm: str) -> OutputFile:
        """See `Storage.begin_object`."""
        return RemoteOutput(path, pool, algorithm)

    def local_path(self, path: RemotePath) -> None:
        """See `local_path`."""

    def open_object(self, path: RemotePath, *, size: int | None, read_ahead: bool) -> ObjectReader:
        """See `open_object`."""
        return RemoteObject(path, size=size, block=BLOCK_NBYTES if read_ahead else 0)

    def open_seekable(self, path: RemotePath) -> IO[bytes]:
        """See `open_seekable`."""
        return path.open("rb")

    def size(self, path: RemotePath) -> int:
        """See `Storage.size`."""
        return path.size()

    def version(self, path: RemotePath) -> tuple[int, str]:
        """See `object_version`."""
        return path.version()

    def children(self, root: RemotePath) -> tuple[list[str], list[str]]:
        """See `children`: a folder is what several names begin with."""
        names = root.object_names()
        folders = {name.partition("/")[0] for name in names if "/" in name}
        return sorted(name for name in names if "/" not in name), sorted(folders)

    def walk(self, root: RemotePath) -> Iterator[WalkedEntry]:
        """See `Storage.walk`: one listing."""
        for name, nbytes in sorted(root.object_sizes().items(), key=lambda item: item[0].split("/")):
            yield ListedObject(str(root / name), tuple(name.split("/")), nbytes)

    def sizes(self, root: RemotePath, names: Sequence[str]) -> dict[str, int]:
        """See `Storage.sizes`."""
        return root.sizes(list(names))

    def can_list(self, root: RemotePath) -> bool:
        """See `Storage.can_list`."""
        return root.can_list

    def names(self, root: RemotePath, below: str) -> list[str]:
        """See `Storage.names`."""
        return sorted(root.object_names(below))

    def entries(self, root: RemotePath) -> Iterator[str]:
        """See `Storage.entries`: objects alone, as some servers list folders that nobody made."""
        return (name.rpartition("/")[2] for name in root.object_names())

    def read(self, path: RemotePath) -> bytes:
        """See `Storage.read`."""
        return path.read_bytes()

    def require_own_files(self, root: RemotePath) -> None:
        """See `Storage.require_own_files`: servers have no links."""

    def foreign_entries(self, root: RemotePath) -> Iterator[tuple[str, str]]:
        """See `Storage.foreign_entries`: servers have none."""
        return iter(())

    def require_plain(self, root: RemotePath, names: Iterable[str], *, follow_links: bool) -> None:
        """See `Storage.require_plain`: servers have no links."""

    def read_all(self, root: RemotePath, names: Sequence[str]) -> dict[str, bytes]:
        """See `Storage.read_all`."""

        def read(name: str) -> bytes | None:
            try:
                return (root / name).read_bytes()
            except FileNotFoundError:
                return None

        contents = zip(names, in_parallel(read, names), strict=True)
        return {name: content for name, content in contents if content is not None}

    def remove(self, root: RemotePath, names: Sequence[str]) -> None:
        """See `Storage.remove`."""
        in_parallel(lambda name: (root / name).unlink(missing_ok=True), list(names))

    def move(self, root: RemotePath, source: str, target: str) -> None:
        """See `Storage.move`."""
        (root / source).replace(root / target)

    def link(self, source: object, target: object) -> bool:
        """See `Storage.link`: an object has one name."""
        return False

    def free_bytes(self, path: RemotePath) -> int | None:
        """See `Storage.free_bytes`: a server does not say."""
        return None

    def beside(self, path: RemotePath, name: str) -> Path:
        """See `Storage.beside`."""
        return Path(name)

    def require_first_creation_wins(self, root: RemotePath) -> None:
        """See `Storage.require_first_creation_wins`."""
        root.require_first_creation_wins()


@dataclass(frozen=True, slots=True)
class ListedObject:
    """Implements `shards.storage.walk.WalkedEntry`: a server lists objects alone."""

    path: str
    parts: tuple[str, ...]
    nbytes: int
    is_folder = False
    is_outside = False

    def size(self) -> int:
        """Return the size of the object in bytes."""
        return self.nbytes

    def head(self, nbytes: int) -> bytes:
        """Return nothing: it would take a request."""
        return b""


class RemoteObject:
    """An object on a server, read a block at a time and the last block kept.

    Attributes:
        path: The object.
        size: Its length.
    """

    def __init__(self, path: RemotePath, *, size: int | None = None, block: int = BLOCK_NBYTES) -> None:
        self.path = path
        self.size = path.size() if size is None else size
        self._size_of_block = block
        self._kept = (
            0,
            b"",
        )  # offset and content of the last block, replaced as one: threads may read at once

    def read(self, nbytes: int, offset: int) -> bytes:
        """See `ObjectReader.read`."""
        nbytes = min(nbytes, self.size - offset)
        if nbytes <= 0:
            return b""
        start, block = self._kept
        if not start <= offset <= offset + nbytes <= start + len(block):
            wanted = min(max(nbytes, self._size_of_block), self.size - offset)
            start, block = offset, self.path.read_range(offset, wanted)
            if self._size_of_block:
                self._kept = start, block
        return block[offset - start : offset - start + nbytes]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kept = (0, b"")


class RemoteOutput(OutputFile):
    """An object that is written into a scratch file without a name, which goes when the process goes, and then sent."""

    def __init__(self, final: RemotePath, pool: Executor, algorithm: str) -> None:
        with tempfile.TemporaryFile(prefix=f"{final.name}.", buffering=0) as scratch:
            super().__init__(final, os.dup(scratch.fileno()), pool, algorithm, past_cache=False)
        self._final = final

    def publish(self) -> bool:
        """See `OutputFile.publish`."""
        # The scratch file has no name of its own; this is how its descriptor is opened once more.
        won = self._final.upload(f"/dev/fd/{self._descriptor}")
        self.discard()
        return won
