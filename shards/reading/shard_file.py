"""One open object of a store, and three ways of getting a row's bytes out of it.

``mmap`` copies from the page cache without a system call: the fastest where the bytes are cached already, but
a page fault on a cold disk reads far more than was asked for. ``pread`` reads exactly the row. ``auto`` asks
the kernel, a row at a time, whether the bytes are cached, and takes the one or the other; see docs/loading.md
for the numbers.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shards.errors import StoreDamagedError
from shards.formats.format import Extents
from shards.metadata.index import ABSENT
from shards.storage.folder import LocalObject
from shards.storage.object_reader import ObjectReader

ReadMode = Literal["auto", "mmap", "pread"]
READ_MODES: tuple[ReadMode, ...] = ("auto", "mmap", "pread")


def _preadv(descriptor: int, out: memoryview, offset: int) -> int:
    return os.preadv(descriptor, [out], offset)


def _pread(descriptor: int, out: memoryview, offset: int) -> int:
    data = os.pread(descriptor, len(out), offset)
    out[: len(data)] = data
    return len(data)


# macOS before 11 and some other systems have no preadv; pread costs one more copy.
read_at: Callable[[int, memoryview, int], int] = _preadv if hasattr(os, "preadv") else _pread
NOWAIT = getattr(os, "RWF_NOWAIT", None)
_STREAK = 16  # rows found cached one after another before one answer counts for more than one row
_STREAK_NS = 1_000_000


class ShardFile(LocalObject):
    """An object of a store, open for reading; closed when the last reference to it goes.

    Attributes:
        extents: Where the rows of one field are in it.
    """

    def __init__(self, path: Path, locate: Callable[[ObjectReader], Extents], mode: ReadMode) -> None:
        super().__init__(path)
        self._map: NDArray[np.uint8] | None = None
        self._mode = mode
        self._probe = [bytearray(1)]
        self._hits = 0
        self._cached_until = 0
        self.extents = locate(self)
        # Views, not lists of numbers: a thousand shards may be open, and a list is five times as large.
        self._offsets, self._sizes = self.extents.offsets.data, self.extents.sizes.data
        if self.extents.end > self.size:
            raise StoreDamagedError(
                f"{path} ends at byte {self.size}, its rows at {self.extents.end}: truncated"
            )
        if mode != "pread" and self.size:
            # numpy's view keeps the map alive, and the map the file.
            mapped = mmap.mmap(self.descriptor, self.size, prot=mmap.PROT_READ)
            self._map = np.frombuffer(mapped, np.uint8)
        if mode != "mmap" and hasattr(os, "posix_fadvise"):
            # Without this the kernel reads ahead by megabytes that a shuffled order does not want.
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def extent(self, slot: int) -> tuple[int, int]:
        """Return the first byte and stored length of a row; (-1, 0) where there is none."""
        return self._offsets[slot], self._sizes[slot]

    def run_length(self, slot: int, most: int) -> int:
        """Return how many rows from ``slot`` on, at most ``most``, are one behind another without a gap."""
        offsets, sizes = self._offsets, self._sizes
        length = 1
        while (
            length < most and offsets[slot + length] == offsets[slot + length - 1] + sizes[slot + length - 1]
        ):
            length += 1
        return length

    def read_into(self, offset: int, out: NDArray[np.uint8]) -> None:
        """Fill ``out``, a contiguous uint8 vector, with the bytes from ``offset`` on.

        Raises:
            StoreDamagedError: If the file ends before ``out`` is full.
        """
        assert offset != ABSENT
        if self._map is not None and (self._mode == "mmap" or self._is_cached(offset, out.nbytes)):
            out[:] = self._map[offset : offset + out.nbytes]
            return
        view = out.data
        filled = 0
        while filled < out.nbytes:
            count = read_at(self.descriptor, view[filled:], offset + filled)
            if count == 0:
                raise StoreDamagedError(f"{self.path} ends at byte {offset + filled}: truncated while in use")
            filled += count

    def _is_cached(self, offset: int, nbytes: int) -> bool:
        """Return whether the last of some bytes is there, and in memory.

        A map of a file that was shortened ends the process where it is touched; asking first turns that into
        `read_into`'s error. Asking takes a tenth of the time of copying a row, so that after a streak of hits an
        answer holds for a millisecond.
        """
        now = time.monotonic_ns()
        if now < self._cached_until:
            return True
        if NOWAIT is None:
            return False
        try:
            hit = os.preadv(self.descriptor, self._probe, offset + nbytes - 1, NOWAIT) == 1
        except OSError:  # not cached, or a file system that cannot say
            hit = False
        self._hits = self._hits + 1 if hit else 0
        if self._hits > _STREAK:
            self._cached_until = now + _STREAK_NS
        return hit
