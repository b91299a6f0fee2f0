"""How many shards a process keeps open: as its limit of open files allows, in equal shares for its readers.

A full shuffle comes back to a shard at every few hundred rows, and opening one costs several times what a row does. The
usual limit of 1024 files is a precaution for programs that use ``select``; a process may raise it up to its hard limit.
"""

from __future__ import annotations

import contextlib
import resource
import threading
from typing import Protocol
from weakref import WeakSet

_WANTED = 65_536  # no more: some programs, started by ours, close every number up to the limit
_MACOS_MOST = 10_240  # OPEN_MAX, above which macOS refuses even where it says that there is no hard limit
_FILES_PER_SHARD = 2  # the file, and the duplicate that Python's mmap keeps


class KeepsShards(Protocol):
    """A reader, as far as it is known here."""

    def keep(self, most: int) -> None:
        """Close shards until at most ``most`` are open."""


class OpenFiles:
    """The readers of a process, each of which may keep `share` shards open; they leave when they are dropped."""

    def __init__(self) -> None:
        self._readers: WeakSet[KeepsShards] = WeakSet()
        self._lock = threading.Lock()

    def join(self, reader: KeepsShards) -> None:
        """Take in a reader; the others close what is beyond the share that is left to them."""
        raise_file_limit()
        with self._lock:
            self._readers.add(reader)
            readers = list(self._readers)
        for other in readers:
            other.keep(self.share())

    def share(self) -> int:
        """Return how many shards each reader may keep open now: half of the process's files are left for all else."""
        shards = file_limit() // 2 // _FILES_PER_SHARD
        return max(1, shards // max(1, len(self._readers)))


def file_limit() -> int:
    """Return how many files this process may have open at once, as far as we would use them."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _WANTED if soft == resource.RLIM_INFINITY else min(soft, _WANTED)


def raise_file_limit() -> None:
    """Let this process open the files we would use, or as many as the system allows; never fewer than before."""
    for wanted in (_WANTED, _MACOS_MOST):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if soft != resource.RLIM_INFINITY and soft < limit:
            with contextlib.suppress(ValueError, OSError):  # refused: the readers do with what there is
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


OPEN_FILES = OpenFiles()
"""This process's."""
