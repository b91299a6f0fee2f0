"""Images inside tar files, found once by offset and later read by range; nothing is ever unpacked.

Of the two kinds, the ImageNet training set as it is downloaded, a tar of one tar a class, is found here, and webdataset
shards in `shards.sources.webdataset`.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from shards.errors import UsageError
from shards.sources.folder import whole_address
from shards.sources.found import IMAGE_SUFFIXES, FoundImage
from shards.storage.location import Location, open_object
from shards.storage.object_reader import ObjectReader


@dataclass(frozen=True)
class Member:
    """A regular file inside a tar.

    Attributes:
        name: Its name there.
        offset: Its first byte in the outermost file.
        nbytes: Its length.
    """

    name: str
    offset: int
    nbytes: int


def members(path: Location, *, offset: int = 0, nbytes: int | None = None) -> Iterator[Member]:
    """The regular files of a tar, or of a tar that lies uncompressed inside another file, in order.

    Raises:
        UsageError: If it is no uncompressed tar, or ends before its time.
    """
    with open_object(path) as source:
        window = _Window(source, offset, source.size - offset if nbytes is None else nbytes)
        try:
            with tarfile.open(fileobj=window, mode="r:") as tar:  # type: ignore[call-overload]
                for member in tar:
                    if member.isfile():
                        yield Member(member.name, offset + member.offset_data, member.size)
        except tarfile.TarError as error:
            raise UsageError(
                f"{path} is not a whole uncompressed tar ({error}); download or unpack it anew"
            ) from error


class _Window:
    """A part of an object, as a file; only what tarfile asks for."""

    def __init__(self, source: ObjectReader, offset: int, nbytes: int) -> None:
        self._source, self._offset, self._nbytes = source, offset, nbytes
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        left = max(self._nbytes - self._position, 0)
        size = left if size < 0 else min(size, left)
        content = self._source.read(size, self._offset + self._position)
        self._position += len(content)
        return content

    def seek(self, position: int, whence: int = 0) -> int:
        assert whence == 0, "tarfile seeks from the beginning only"
        self._position = position
        return position

    def tell(self) -> int:
        return self._position


def is_tar_of_tars(path: Location) -> bool:
    """Whether the first file in a tar is itself a tar."""
    first = next(members(path), None)
    return first is not None and first.name.endswith(".tar")


def find_in_tar_of_tars(path: Location) -> Iterator[FoundImage]:
    """Every image of a tar of tars such as `ILSVRC2012_img_train.tar`: the inner tar's name is the class.

    Raises:
        UsageError: If an inner tar is damaged.
    """
    for outer in members(path):
        if not outer.name.endswith(".tar"):
            continue
        class_name = PurePosixPath(outer.name).stem
        for inner in members(path, offset=outer.offset, nbytes=outer.nbytes):
            if PurePosixPath(inner.name).suffix.lower() in IMAGE_SUFFIXES:
                key = f"{class_name}/{inner.name}"
                yield FoundImage(key, class_name, whole_address(path), inner.offset, inner.nbytes)
