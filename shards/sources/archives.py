"""Opening what sources name, regular files alone; and the identity of archives whose offsets are trusted later."""

import hashlib
import struct
from pathlib import Path

from shards.metadata.archives import ArchiveIdentity
from shards.storage.entries import open_if_regular
from shards.storage.location import Location, object_version


class NotAFileError(OSError):
    """A name stands for a pipe, a socket, a device or a folder, where a file was expected."""


def open_regular(path: Path) -> int:
    """Return a descriptor of a regular file, or of one that a link leads to; never waits, as opening a pipe would.

    Raises:
        NotAFileError: If it is something else.
        OSError: If it cannot be opened.
    """
    opened = open_if_regular(path)
    if opened is None:
        raise NotAFileError(f"{path} is no regular file")
    return opened[0]


def identity_now(path: Location) -> ArchiveIdentity:
    """Size and time of an archive as it is now.

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
        import google_crc32c

        nbytes, checksum = (-1, 0) if content is None else (len(content), google_crc32c.value(bytes(content)))
        self._digest.update(struct.pack("<qI", nbytes, checksum))

    def hex(self) -> str:
        """Return the digest so far."""
        return self._digest.hexdigest()
