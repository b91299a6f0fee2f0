"""Parts of remote objects kept on a disk of this machine, for any number of processes and runs at once.

An entry is one file, named by the SHA-256 of the object it is a part of and the part's first byte and length:
objects of one store are never taken for another's. It ends in the CRC32C of its content and appears by a rename,
so that a killed process leaves nothing that reads as data; an entry that fails its checksum is removed and fetched
again. There are no locks.

When the cache is full, the entries that were read longest ago go first, but none that was read within
`RESTING_SECONDS`: training reads every row once an epoch, so that a cache smaller than the store, if it always took
in the newest, would give up each row shortly before it is wanted (of a cache of half the store's size, 15 % of
reads would hit in place of 50 %). Until something may go, nothing new comes in, and nobody looks for what may go.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.errors import UsageError
from shards.storage.atomic import is_temporary, temporary_path
from shards.storage.checksum import crc32c

RESTING_SECONDS = 6 * 3600.0
_CRC_BYTES = 4
_ABANDONED_SECONDS = 600.0
_LOOK_AGAIN_SECONDS = 60.0
_STALE_SECONDS = 60.0  # an entry's time is renewed when it is older than this: not at every read

# A process looks at the whole cache each time it has added a 64th of the limit, and leaves an eighth free: up to eight
# processes stay below the limit together.
_SLACK, _ROOM = 8, 64


class RangeCache:
    """Keeps parts of objects, up to a number of bytes in all.

    Args:
        folder: Where; may be shared by several processes and runs.
        limit: Bytes in all.

    Raises:
        UsageError: If the limit is not positive.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        if limit < 1:
            raise UsageError(f"--cache-bytes must be at least 1, got {limit}; such as 500000000000")
        self._folder = folder
        self._limit = limit
        self._room = 0
        self._looked = -float("inf")
        self._oldest: tuple[float, Path] | None = None  # of a full cache: when it was read, and which it is
        self._lock = threading.Lock()

    def read_into(self, digest: str, offset: int, out: NDArray[np.uint8]) -> bool:
        """Fill ``out``, a uint8 vector, with a part of an object; says whether it was there, whole.

        Args:
            digest: SHA-256 of the object.
            offset: First byte of the part.
            out: As long as the part.
        """
        path = self._path(digest, offset, out.nbytes)
        try:
            with path.open("rb", buffering=0) as file:
                filled = file.readinto(out.data)
                checksum = file.read(_CRC_BYTES + 1)
                if time.time() - os.fstat(file.fileno()).st_mtime > _STALE_SECONDS:
                    os.utime(file.fileno())
        except FileNotFoundError:
            return False
        if filled == out.nbytes and checksum == _checksum(out):
            return True
        path.unlink(missing_ok=True)
        return False

    def add(self, digest: str, offset: int, content: NDArray[np.uint8]) -> None:
        """Keep a part of an object, if there is room.

        Args:
            digest: SHA-256 of the object.
            offset: First byte of the part.
            content: The part, a uint8 vector.
        """
        if not self._may_add(content.nbytes + _CRC_BYTES):
            return
        path = self._path(digest, offset, content.nbytes)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_path(path)
        try:
            with temporary.open("xb", buffering=0) as file:
                file.write(content.data)
                file.write(_checksum(content))
            temporary.replace(path)
        except OSError:
            # A cache that cannot be written to, full disk included, must not stop the training; it takes nothing.
            temporary.unlink(missing_ok=True)

    def _path(self, digest: str, offset: int, nbytes: int) -> Path:
        return self._folder / digest[:2] / digest / f"{offset}-{nbytes}"

    def _may_add(self, nbytes: int) -> bool:
        with self._lock:
            if nbytes > self._room and time.monotonic() - self._looked > _LOOK_AGAIN_SECONDS:
                if not self._all_in_use():
                    self._room = self._make_room(nbytes)
                self._looked = time.monotonic() if self._room < nbytes else -float("inf")
            if nbytes > self._room:
                return False
            self._room -= nbytes
            return True

    def _all_in_use(self) -> bool:
        """Return whether it is known without a look at every entry that nothing may go yet.

        Times of entries only become later: nothing rests before the entry that was the oldest does. If that entry is
        gone, the folder may have been emptied.
        """
        if self._oldest is None:
            return False
        read, path = self._oldest
        return time.time() < read + RESTING_SECONDS and path.exists()

    def _make_room(self, nbytes: int) -> int:
        """Remove what has rested long enough until there is room; gives the bytes that may be added, or 0."""
        entries, total = [], 0
        now = time.time()
        for entry in self.files():
            try:
                status = entry.stat()
            except FileNotFoundError:  # another process was faster
                continue
            if not is_temporary(Path(entry.path)):
                entries.append((status.st_mtime, status.st_size, entry.path))
                total += status.st_size
            elif now - status.st_mtime > _ABANDONED_SECONDS:
                Path(entry.path).unlink(missing_ok=True)
        most = self._limit - self._limit // _SLACK
        share = max(self._limit // _ROOM, nbytes)
        self._oldest = None
        for read, size, path in sorted(entries):
            if total + share <= most:
                break
            if now - read < RESTING_SECONDS:
                self._oldest = read, Path(path)
                break
            Path(path).unlink(missing_ok=True)
            total -= size
        return max(0, min(share, most - total))

    def files(self) -> Iterator[os.DirEntry[str]]:
        """Yield every file in the cache's folder."""
        folders = [str(self._folder)]
        while folders:
            try:
                with os.scandir(folders.pop()) as entries:
                    for entry in entries:
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(entry.path)
                        else:
                            yield entry
            except FileNotFoundError:
                continue


def range_cache(folder: Path | None, limit: int | None) -> RangeCache | None:
    """Return the cache that ``--cache`` and ``--cache-bytes`` name; None if neither is given.

    Raises:
        UsageError: If one is given without the other.
    """
    if folder is None and limit is None:
        return None
    if folder is None or limit is None:
        raise UsageError("--cache and --cache-bytes belong together: a folder and the bytes it may hold")
    return RangeCache(folder, limit)


def _checksum(content: NDArray[np.uint8]) -> bytes:
    return crc32c(content).to_bytes(_CRC_BYTES, "little")
