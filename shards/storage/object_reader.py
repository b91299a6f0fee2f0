"""Bytes of one object at any place: what reading a shard's index, walking a tar and looking for damage need.

Training rows take faster ways: `shards.reading.shard_file` on this machine, `shards.reading.remote_reader` from
a server.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from shards.errors import StoreDamagedError
from shards.storage.location import Location
from shards.storage.remote_path import RemotePath

_BLOCK = 1 << 23  # bytes asked of a server at once by who reads an object from front to back


class ObjectReader(Protocol):
    """An object that is open for reading."""

    @property
    def path(self) -> Location:
        """The object."""

    @property
    def size(self) -> int:
        """Its length in bytes."""

    def read(self, nbytes: int, offset: int) -> bytes:
        """The bytes from ``offset`` on; fewer than ``nbytes`` only where the object ends."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class LocalObject:
    """A file, closed when the last reference to it goes.

    Attributes:
        path: Its path.
        descriptor: The open file.
        size: Its length when it was opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self.descriptor).st_size

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


class RemoteObject:
    """An object on a server, read a block at a time and the last block kept.

    Attributes:
        path: Its place.
        size: Its length.
    """

    def __init__(self, path: RemotePath, *, size: int | None = None, block: int = _BLOCK) -> None:
        self.path = path
        self.size = path.size() if size is None else size
        self._size_of_block = block
        self._start = 0
        self._block = b""

    def read(self, nbytes: int, offset: int) -> bytes:
        """See `ObjectReader.read`."""
        nbytes = max(0, min(nbytes, self.size - offset))
        if not self._start <= offset <= offset + nbytes <= self._start + len(self._block):
            wanted = min(max(nbytes, self._size_of_block), self.size - offset)
            self._block, self._start = self.path.read_range(offset, wanted), offset
        begin = offset - self._start
        return self._block[begin : begin + nbytes]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._block = b""


def open_object(path: Location) -> ObjectReader:
    """Open an object to be read mostly from front to back.

    Raises:
        FileNotFoundError: If it is not there.
    """
    return RemoteObject(path) if isinstance(path, RemotePath) else LocalObject(path)


def blocks_of(source: ObjectReader) -> Iterator[bytes]:
    """The whole object in blocks.

    Raises:
        StoreDamagedError: If it ends before its length.
    """
    for offset in range(0, source.size, _BLOCK):
        block = source.read(_BLOCK, offset)
        if len(block) < min(_BLOCK, source.size - offset):
            raise StoreDamagedError(
                f"{source.path} ends at byte {offset + len(block)}: truncated while in use"
            )
        yield block
