"""The shards of a field as one array of rows, so that a whole batch is gathered in one call.

Row by row, Python spends some 5 µs a row, which limits compact latents of a few kilobytes. Here every shard is mapped
at its own offset of one range of addresses. Where all rows have one size and are at multiples of it, as in uncompressed
shards of the zarr format, a row of the store is then a row of one two-dimensional array, and numpy gathers a batch
without the interpreter's lock.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import math
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.errors import StoreDamagedError

MOST_ROW_NBYTES = 1 << 16
"""Rows above this size are read one by one: copying them takes longer than the interpreter does."""

_MAP_FIXED = 0x10  # the same number on every architecture of Linux
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0)
_KNOWN_SECONDS = 1e-3  # how long a shard is taken to be as long as it was when its size was last looked up
_PROBES = 4  # rows of a batch whose presence in the page cache is looked up
_CACHED_SECONDS = 1e-2
_PIECE_NBYTES = 1 << 18
_UNKNOWN = -1


OpenShard = Callable[[int], tuple[Path, int, NDArray[np.int64]]]
"""Gives path, size in bytes, and first byte of each row, int64[capacity], -1 for none, of a shard."""


class RowWindow:
    """Rows of a field by number, in one array over all of its shards; safe to be used by several threads.

    Args:
        num_shards: Shards of the field.
        capacity: Rows of a shard.
        row_nbytes: Bytes of a row.
    """

    def __init__(self, num_shards: int, capacity: int, row_nbytes: int) -> None:
        self._capacity, self._row_nbytes = capacity, row_nbytes
        # A shard begins at a page and at a multiple of a row; behind its rows lies its index.
        unit = math.lcm(row_nbytes, mmap.PAGESIZE)
        index_nbytes = 16 * capacity + 4
        self._stride = -(-(capacity * row_nbytes + index_nbytes) // unit) * unit
        self._range = mmap.mmap(
            -1, num_shards * self._stride, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE, mmap.PROT_READ
        )
        flat = np.frombuffer(self._range, np.uint8)
        self._address = flat.ctypes.data
        self._rows = flat.reshape(-1, row_nbytes)
        self._entries = np.full(num_shards * capacity, _UNKNOWN, np.int64)
        self._mapped = np.zeros(num_shards, np.bool_)
        self._paths: dict[int, tuple[Path, int]] = {}
        self._looked_up = np.zeros(num_shards)
        self._cached_until = 0.0
        self._lock = threading.Lock()

    @staticmethod
    def is_supported() -> bool:
        """Return whether this system maps files at chosen addresses in the way that is used here."""
        return sys.platform == "linux"

    def entries(self, rows: NDArray[np.int64], open_shard: OpenShard) -> NDArray[np.int64] | None:
        """Return where rows are in the array, int64[b]; None where one of them cannot be taken from it.

        Maps the shards that have not been mapped yet, and looks up the sizes of those looked up over a millisecond ago:
        touching a mapped page behind the end of a file that was shortened would end the process.

        Args:
            rows: Rows of the store, int64[b].
            open_shard: Called with the number of a shard that is to be mapped.

        Raises:
            StoreDamagedError: Naming the file, if a shard is shorter than it was.
            OSError: If a shard is gone.
        """
        shards = np.flatnonzero(np.bincount(rows // self._capacity))
        for shard in shards[~self._mapped[shards]].tolist():
            self._map(shard, *open_shard(shard))
        now = time.monotonic()
        for shard in shards[self._looked_up[shards] < now - _KNOWN_SECONDS].tolist():
            path, size = self._paths[shard]
            found = os.stat(path).st_size  # noqa: PTH116 - a third of the time of Path.stat
            if found < size:
                raise StoreDamagedError(f"{path} ends at byte {found}: truncated while in use")
            self._looked_up[shard] = now
        entries = self._entries[rows]
        return None if (entries == _UNKNOWN).any() else entries

    def is_cached(self, rows: NDArray[np.int64]) -> bool:
        """Return whether a few of some rows are in the page cache; False where the system cannot say.

        Mapped pages that are not there are read in pieces of a page, which on a disk takes several times as long as
        reading the row. An answer that is yes holds for ten milliseconds.

        Args:
            rows: Rows whose shards are mapped, int64[b].
        """
        now = time.monotonic()
        if now < self._cached_until:
            return True
        for row in rows[:: max(1, len(rows) // _PROBES)].tolist():
            shard = row // self._capacity
            offset = int(self._entries[row]) * self._row_nbytes - shard * self._stride
            if not _is_byte_cached(self._paths[shard][0], offset + self._row_nbytes - 1):
                return False
        self._cached_until = now + _CACHED_SECONDS
        return True

    def gather(
        self, entries: NDArray[np.int64], out: NDArray[np.uint8], at: NDArray[np.int64] | None
    ) -> None:
        """Copy rows into a buffer.

        Args:
            entries: What `entries` gave, int64[b].
            out: The buffer, uint8 [k, row_nbytes], C-contiguous.
            at: Row of ``out`` for each, int64[b]; by default 0, 1, 2...
        """
        # Every entry is in range; with mode="raise" numpy would gather into a buffer of its own first.
        if at is None:
            np.take(self._rows, entries, axis=0, out=out[: len(entries)], mode="clip")
        elif len(at) and at[-1] - at[0] == len(at) - 1 and bool((np.diff(at) == 1).all()):
            np.take(self._rows, entries, axis=0, out=out[at[0] : at[0] + len(at)], mode="clip")
        else:
            # By way of a piece of memory that stays in the processor's cache.
            piece = np.empty(
                (min(len(entries), max(1, _PIECE_NBYTES // self._row_nbytes)), self._row_nbytes), np.uint8
            )
            for first in range(0, len(entries), len(piece)):
                part = entries[first : first + len(piece)]
                np.take(self._rows, part, axis=0, out=piece[: len(part)], mode="clip")
                out[at[first : first + len(piece)]] = piece[: len(part)]

    def _map(self, shard: int, path: Path, size: int, offsets: NDArray[np.int64]) -> None:
        present = offsets >= 0
        entries = (shard * self._stride + offsets) // self._row_nbytes
        aligned = present & (offsets % self._row_nbytes == 0) & (offsets + self._row_nbytes <= self._stride)
        with self._lock:
            if self._mapped[shard]:
                return
            if size:
                _map_file(path, self._address + shard * self._stride, min(size, self._stride))
            first = shard * self._capacity
            self._entries[first : first + self._capacity] = np.where(aligned, entries, _UNKNOWN)
            self._paths[shard] = path, size
            self._mapped[shard] = True


def _map_file(path: Path, address: int, nbytes: int) -> None:
    """Map the beginning of a file, for reading, at an address inside a range that this process has reserved.

    Source: mmap(2); Python's own mmap takes no address.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = libc.mmap(address, nbytes, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0)
    finally:
        os.close(descriptor)  # the mapping keeps the file
    if found != address:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))


def _is_byte_cached(path: Path, offset: int) -> bool:
    if not hasattr(os, "RWF_NOWAIT") or not hasattr(os, "preadv"):
        return False
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except OSError:  # not cached, or a file system that cannot say
        return False
    finally:
        os.close(descriptor)
