"""Opening what sources name, regular files alone; and the identity of archives whose offsets are trusted later."""

import hashlib
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from shards.errors import StoreDamagedError
from shards.metadata.archives import ArchiveIdentity
from shards.storage.checksum import crc32c
from shards.storage.location import Location, object_version, open_object, open_seekable
from shards.storage.object_reader import ObjectReader


class NotAFileError(OSError):
    """A pipe, a socket, a device or a folder was found where a file was expected."""


def open_source(path: Location, *, read_ahead: bool = True) -> ObjectReader:
    """Open a file that a source names, as `open_object`; never wait, as opening a pipe would.

    Raises:
        NotAFileError: If it is no regular file, nor a link to one.
        OSError: If it cannot be opened.
    """
    with _regular_alone(path):
        return open_object(path, read_ahead=read_ahead)


def open_source_seekable(path: Location) -> Path | IO[bytes]:
    """Open a file that a source names for a library, as `open_seekable`; errors as those of `open_source`."""
    with _regular_alone(path):
        return open_seekable(path)


@contextmanager
def _regular_alone(path: Location) -> Iterator[None]:
    try:
        yield
    except StoreDamagedError as error:
        raise NotAFileError(f"{path} is no regular file") from error


def identity_now(path: Location) -> ArchiveIdentity:
    """Return the size and time of an archive as it is now.

    Raises:
        FileNotFoundError: If it is not there.
    """
    return ArchiveIdentity(*object_version(path))


class RowsDigest:
    """SHA-256 over length and CRC32C of images in order of row; a row without an image counts as length −1."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, content: bytes | memoryview | None) -> None:
        """Take the next row."""
        nbytes, checksum = (-1, 0) if content is None else (len(content), crc32c(content))
        self._digest.update(struct.pack("<qI", nbytes, checksum))

    def hex(self) -> str:
        """Return the digest so far."""
        return self._digest.hexdigest()
