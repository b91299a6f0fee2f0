"""The bytes of one image, from wherever the plan says they are."""

import errno
from collections.abc import Mapping
from contextlib import suppress
from types import MappingProxyType, TracebackType
from typing import Protocol, Self

from shards.errors import UserError
from shards.metadata.archives import ArchiveIdentity
from shards.sources.addresses import location_of
from shards.sources.archives import NotAFileError, open_source
from shards.sources.parquet_rows import ParquetRows
from shards.sources.roots import SourceRoots
from shards.sources.tar_headers import LARGEST_FILE
from shards.sources.tar_members import MemberGoneError, TarMembers
from shards.storage.location import Location, lists_objects

_ARCHIVES = (".parquet", ".tar")
"""Endings of files that hold several images: without the file itself, the source is gone."""
NO_ARCHIVES: Mapping[str, ArchiveIdentity] = MappingProxyType({})


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
        """The file or archive it is in."""

    @property
    def offset(self) -> int:
        """Its first byte in a tar, its row in a parquet file, 0 of a whole file; a kind may choose its own."""

    @property
    def nbytes(self) -> int:
        """Its size in bytes when it was listed."""


class SourceReader:
    """Reads the bytes of images; may be used by several threads at once, and as a context manager.

    An image is a whole file (offset 0), a range of a tar (offset of its first byte), or a row of a parquet file
    (offset = number of the row). Nothing but regular files is opened, and no more than a file's stated bytes are read.

    Args:
        archives: What each archive was when it was listed, by address: offsets into another file are not trusted.
        roots: Where images may be; None where the user has named the source, and the listing has followed it.
    """

    def __init__(
        self, archives: Mapping[str, ArchiveIdentity] = NO_ARCHIVES, roots: SourceRoots | None = None
    ) -> None:
        self._tars = TarMembers(archives)
        self._tables = ParquetRows()
        self._archives = archives
        self._roots = roots

    def close(self) -> None:
        """Close all archives."""
        self._tars.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def require_same_rows(self) -> None:
        """Compare the parquet files, whose rows have no names, with what they were when they were listed.

        Raises:
            SourceChangedError: If one was rewritten.
        """
        for uri, archive in self._archives.items():
            if archive.rows and (self._roots is None or self._roots.hold(uri)):
                path = location_of(uri)
                with suppress(
                    FileNotFoundError, NotADirectoryError
                ):  # whoever reads a row says that it is gone
                    self._tables.require_same(path, archive)

    def read(self, record: ImagePlace, *, any_size: bool = False) -> bytes:
        """Return all bytes of one image.

        Args:
            record: Which image.
            any_size: Accept another size than when it was listed: it may have been repaired.

        Raises:
            BadImageError: If this image is missing, unreadable or has another size than when it was listed, or lies
                where nothing is to be read.
            SourceGoneError: If the folder or archive it lay in is gone, or is another one.
            OSError: If the device fails; reading again may help.
        """
        if self._roots is not None and not self._roots.hold(record.uri):
            raise BadImageError(
                f"outside of the source: {_folder_of(record.uri)} was not named; allow it with --source PLACE"
            )
        path = location_of(record.uri)
        try:
            content = self._content(path, record, any_size=any_size)
        except MemberGoneError as error:
            raise BadImageError(str(error)) from error
        except (FileNotFoundError, NotADirectoryError) as error:
            gone = path if path.suffix.lower() in _ARCHIVES else path.parent
            if not _may_exist(gone):
                raise SourceGoneError(
                    f"the source is gone: {gone} does not exist any more; bring it back and run the same "
                    "command again"
                ) from error
            raise BadImageError("missing: it was there when the source was listed") from error
        except PermissionError as error:
            raise BadImageError("unreadable: permission denied") from error
        except NotAFileError as error:
            raise BadImageError("unreadable: it is no regular file") from error
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENXIO):
                raise
            raise BadImageError("unreadable: a link that leads to itself") from error
        if len(content) != record.nbytes and not any_size:
            raise BadImageError(
                f"changed since it was listed: {record.nbytes} bytes then, {len(content)} now"
            )
        return content

    def _content(self, path: Location, record: ImagePlace, *, any_size: bool) -> bytes:
        """Read an image by the kind of its file; the endings of archives are `_ARCHIVES`.

        Raises:
            MemberGoneError: If it is not in its file any more, or cannot be used.
        """
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            return self._row(path, record)
        if suffix == ".tar":
            return self._tars.read(path, record, any_size=any_size)
        return _file_bytes(path, None if any_size else record.nbytes)

    def _row(self, path: Location, record: ImagePlace) -> bytes:
        content = self._tables.read(path, record.offset, self._archives.get(record.uri))
        if isinstance(content, bytes):
            return content
        reason = f"row of {path.name} holds no bytes, and its path names no file beside it"
        if content is not None:
            reason += f" ({content}); files elsewhere are read if --source names their folder"
        raise BadImageError(reason)


def _file_bytes(path: Location, nbytes: int | None) -> bytes:
    """Return a whole file; of one that has another length than was stated nothing but that length is read.

    Raises:
        MemberGoneError: If it has another length, or is far too long for an image.
        NotAFileError: If it is a pipe or a device.
    """
    with open_source(path) as source:
        if nbytes is not None and source.size != nbytes:
            raise MemberGoneError(f"changed since it was listed: {nbytes} bytes then, {source.size} now")
        if source.size > LARGEST_FILE:
            raise MemberGoneError(f"{source.size} bytes are more than an image may have, {LARGEST_FILE}")
        return source.read(source.size, 0)


def _folder_of(uri: str) -> str:
    return uri.rpartition("/")[0] or uri


def _may_exist(place: Location) -> bool:
    """Return whether a file or folder is there, or may be: web servers do not list what they have."""
    return place.exists() or not lists_objects(place) or place.is_dir()
