"""Writing an open file from front to back, past the page cache where memory, place and length allow it.

The copy into the page cache costs more processor time than a row's digest and statistics together, and buys nothing for
a store that is larger than the memory (`benchmarks/writing.py`). Linux spares it for pieces that begin and end at pages
(``O_DIRECT``); everything else, and every file system that has no such writes, goes through the cache.

Source: open(2), https://man7.org/linux/man-pages/man2/open.2.html, "O_DIRECT".
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Sequence

import numpy as np

PAGE = 4096
"""Bytes at whose multiples memory, place and length of a piece must begin and end: what all disks allow."""

_MAX_VECTORS = 1024  # IOV_MAX on Linux
_WORTH_IT = 1 << 20  # bytes from which on a write that waits for the disk is not slower than a copy
_O_DIRECT: int = getattr(os, "O_DIRECT", 0)


class FileWriter:
    """Writes to a descriptor at its end.

    Args:
        descriptor: An empty file that is open for writing; it stays open.
        past_cache: Whether to go past the page cache where that can be done.

    Attributes:
        seconds: Time spent in writing so far.
        is_direct: Whether the last write went past the page cache, so that nothing of it waits to be flushed.
    """

    def __init__(self, descriptor: int, *, past_cache: bool) -> None:
        self.seconds = 0.0
        self.is_direct = False
        self._descriptor = descriptor
        self._position = 0
        self._may_be_direct = past_cache and bool(_O_DIRECT)

    def write(self, views: Sequence[memoryview]) -> None:
        """Append bytes."""
        waiting = list(views[::-1])
        begun = time.perf_counter()
        while waiting:
            written = self._write_some(waiting[: -_MAX_VECTORS - 1 : -1])
            self._position += written
            while written:
                head = waiting.pop()
                if head.nbytes > written:
                    waiting.append(head[written:])
                    written = 0
                else:
                    written -= head.nbytes
        self.seconds += time.perf_counter() - begun

    def _write_some(self, group: list[memoryview]) -> int:
        self._set_direct(wanted=self._may_be_direct and self._fits(group))
        try:
            return os.writev(self._descriptor, group)
        except OSError as error:
            if not self.is_direct or error.errno != errno.EINVAL:
                raise
        self._may_be_direct = False  # this disk wants larger pages
        self._set_direct(wanted=False)
        return os.writev(self._descriptor, group)

    def _fits(self, group: list[memoryview]) -> bool:
        if self._position % PAGE or sum(view.nbytes for view in group) < _WORTH_IT:
            return False
        return all(view.nbytes % PAGE == 0 and _address(view) % PAGE == 0 for view in group)

    def _set_direct(self, *, wanted: bool) -> None:
        if wanted == self.is_direct:
            return
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & ~_O_DIRECT
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | (_O_DIRECT if wanted else 0))
        except OSError as error:
            if not wanted or error.errno != errno.EINVAL:
                raise
            self._may_be_direct = False  # a file system without such writes
            return
        self.is_direct = wanted


def _address(view: memoryview) -> int:
    address: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return address
