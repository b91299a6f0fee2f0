"""The bytes of one image, from wherever the plan says they are."""

import errno
import os
import threading
from collections import OrderedDict
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self
from urllib.parse import unquote_to_bytes

from shards.errors import UserError
from shards.sources.parquet_rows import ParquetRows
from shards.storage.location import Location
from shards.storage.remote_path import RemotePath, is_url

_OPEN_ARCHIVES = 64


class BadImageError(Exception):
    """One image cannot be used; the message is the reason that the store lists for it."""


class SourceGoneError(UserError):
    """The source as a whole is no longer there."""


class ImagePlace(Protocol):
    """Where the bytes of one image lie: a `FoundImage` of a listing, or a `SourceRecord` of a plan."""

    @property
    def key(self) -> str:
        """Its name in the source."""

    @property
    def uri(self) -> str:
        """The file or archive it lies in."""

    @property
    def offset(self) -> int:
        """Its first byte in a tar, its row in a parquet file, else 0."""

    @property
    def nbytes(self) -> int:
        """Its size in bytes when it was listed."""


class SourceReader:
    """Reads the bytes of images; may be used by several threads at once, and as a context manager.

    A record is a whole file (offset 0), a range of a tar (offset of its first byte), or a row of a parquet file
    (offset = number of the row).
    """

    def __init__(self) -> None:
        self._archives: OrderedDict[Path, int] = OrderedDict()
        self._tables = ParquetRows()
        self._lock = threading.Lock()

    def close(self) -> None:
        """Closes all archives."""
        with self._lock:
            for descriptor in self._archives.values():
                os.close(descriptor)
            self._archives.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read(self, record: ImagePlace, *, any_size: bool = False) -> bytes:
        """All bytes of one image.

        Args:
            record: Which image.
            any_size: Accept another size than when it was listed: it may have been repaired.

        Raises:
            BadImageError: If this image is missing, unreadable or has another size than when it was listed.
            SourceGoneError: If the folder or archive it lay in is gone.
            OSError: If the device fails; reading again may help.
        """
        path = RemotePath.of_url(record.uri) if is_url(record.uri) else local_path(record.uri)
        suffix = path.suffix.lower()
        try:
            if suffix == ".parquet":
                content = self._row(path, record.offset)
            elif suffix == ".tar":
                content = self._read_range(path, record.offset, record.nbytes)
            else:
                content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            gone = path if suffix in (".parquet", ".tar") else path.parent
            if not (gone.exists() or _may_be_folder(gone)):
                raise SourceGoneError(
                    f"the source is gone: {gone} does not exist any more; bring it back and run the same command again"
                ) from error
            raise BadImageError("missing: it was there when the source was listed") from error
        except PermissionError as error:
            raise BadImageError("unreadable: permission denied") from error
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise BadImageError("unreadable: a link that leads to itself") from error
        if len(content) != record.nbytes and not any_size:
            raise BadImageError(
                f"changed since it was listed: {record.nbytes} bytes then, {len(content)} now"
            )
        return content

    def _row(self, path: Location, row: int) -> bytes:
        content = self._tables.read(path, row)
        if content is None:
            raise BadImageError(f"row of {path.name} holds no bytes, and its path names no file beside it")
        return content

    def _read_range(self, path: Location, offset: int, nbytes: int) -> bytes:
        if isinstance(path, RemotePath):
            return path.read_range(offset, nbytes)
        with self._lock:
            descriptor = self._archives.pop(path, None)
            if descriptor is None:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._archives[path] = descriptor
            # A second descriptor of the same file, so that the oldest one can be closed while it is being read.
            own = os.dup(descriptor)
            if len(self._archives) > _OPEN_ARCHIVES:
                os.close(self._archives.popitem(last=False)[1])
        try:
            return os.pread(own, nbytes, offset)
        finally:
            os.close(own)


def _may_be_folder(place: Location) -> bool:
    """Whether images may lie below a place of a server, which has no folders of their own; web servers do not say."""
    return isinstance(place, RemotePath) and (not place.can_list or place.is_dir())


def local_path(uri: str) -> Path:
    """The path of a local address."""
    if uri.startswith("file://"):
        return Path(os.fsdecode(unquote_to_bytes(uri.removeprefix("file://"))))
    return Path(uri)
