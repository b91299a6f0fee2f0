"""Bytes of one object at any offset: what reading a shard's index, walking a tar and looking for damage need.

Training rows take faster ways: `shards.reading.shard_file` on this machine, `shards.reading.remote_reader` from
a server.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from shards.errors import StoreDamagedError
from shards.storage.remote_path import RemotePath

BLOCK_NBYTES = 1 << 23
"""Bytes read at once by who reads an object from front to back."""


class ObjectReader(Protocol):
    """An object that is open for reading."""

    @property
    def path(self) -> Path | RemotePath:
        """The object."""

    @property
    def size(self) -> int:
        """Its length in bytes."""

    def read(self, nbytes: int, offset: int) -> bytes:
        """Return the bytes from ``offset`` on; fewer than ``nbytes`` only where the object ends."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def blocks_of(source: ObjectReader) -> Iterator[bytes]:
    """Yield the whole object in blocks.

    Raises:
        StoreDamagedError: If it ends before its length.
    """
    for offset in range(0, source.size, BLOCK_NBYTES):
        block = source.read(BLOCK_NBYTES, offset)
        if len(block) < min(BLOCK_NBYTES, source.size - offset):
            raise StoreDamagedError(
                f"{source.path} ends at byte {offset + len(block)}: truncated while in use"
            )
        yield block
