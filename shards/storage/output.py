"""An object that is written from front to back and then published, whole, if its name is still free.

Its digest is known the moment it is complete.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from pathlib import Path

from shards.storage.digests import ALGORITHMS
from shards.storage.file_writer import FileWriter
from shards.storage.remote_path import RemotePath

Buffer = bytes | memoryview

_WORTH_A_THREAD = 1 << 18
_FLUSH_EVERY = 1 << 26  # bytes after which the disk is set to work, so that the last flush has little left


class OutputFile(ABC):
    """Writes a file from front to back, hashing each piece in a helper thread while it is being written.

    Args:
        final: Name the file is meant for.
        descriptor: An empty file of this machine that is open for writing; closed by `discard`.
        pool: Where hashing and flushing may be done.
        algorithm: Of the digest, one of `shards.storage.digests.ALGORITHMS`.
        past_cache: Whether what is written may go past the page cache.

    Attributes:
        final: Name the file is meant for.
        position: Bytes written so far.
    """

    def __init__(
        self,
        final: Path | RemotePath,
        descriptor: int,
        pool: Executor,
        algorithm: str,
        *,
        past_cache: bool,
    ) -> None:
        self.final = final
        self.position = 0
        self._descriptor = descriptor
        self._file = FileWriter(descriptor, past_cache=past_cache)
        self._pool = pool
        self._hasher = ALGORITHMS[algorithm]()
        self._flushed = 0
        self._flushing: Future[None] | None = None

    def write(self, buffers: Sequence[Buffer]) -> None:
        """Append the bytes of C-contiguous buffers; they may be reused when this returns."""
        views = [memoryview(buffer).cast("B") for buffer in buffers if memoryview(buffer).nbytes]
        nbytes = sum(view.nbytes for view in views)
        hashing: Future[None] | None = None
        if nbytes >= _WORTH_A_THREAD:
            hashing = self._pool.submit(self._hash, views)
        try:
            self._file.write(views)
        finally:
            if hashing is not None:
                hashing.result()
        if hashing is None:
            self._hash(views)
        self.position += nbytes
        if (
            not self._file.is_direct
            and self.position - self._flushed >= _FLUSH_EVERY
            and (self._flushing is None or self._flushing.done())
        ):
            self._finish_flush()
            self._flushed = self.position
            self._flushing = self._pool.submit(os.fsync, self._descriptor)

    @property
    def disk_seconds(self) -> float:
        """Time that the disk has taken so far to write."""
        return self._file.seconds

    def _finish_flush(self) -> None:
        """Wait for a flush under way, and raise what it met."""
        flushing, self._flushing = self._flushing, None
        if flushing is not None:
            flushing.result()

    def _hash(self, views: list[memoryview]) -> None:
        for view in views:
            self._hasher.update(view)

    def finish(self) -> str:
        """Complete the file; returns its digest in hexadecimal digits."""
        self._finish_flush()
        return self._hasher.hexdigest()

    @abstractmethod
    def publish(self) -> bool:
        """Give the finished object its name; says whether that was still free."""

    def discard(self) -> None:
        """Close the file, and remove it unless it is published."""
        if self._descriptor >= 0:
            if self._flushing is not None:
                self._flushing.exception()  # the descriptor must stay open until it is done
            os.close(self._descriptor)
            self._descriptor = -1
