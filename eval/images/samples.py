"""`samples.npz`, written in any order by any number of processes, interrupted and continued.

The finished file is what the published evaluators read: one array `arr_0`, uint8 [n, H, W, 3], stored without
compression. Until then the images are in `samples.npz.partial` at their final offsets, and
`samples.npz.written` holds one byte an image that says whether it is there. Sample i never depends on who
made it, so a continued run may share the rest out differently.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from eval.images.npz import open_npz, read_array, read_header
from shards import UserError, replacing

_MEMBER = "arr_0.npy"
_COPY_BYTES = 64 << 20


class SamplesFile:
    """The samples of one generation run on disk.

    Args:
        path: The final file, `…/samples.npz`.
        num_samples: Number of images n.
        image_size: Height and width of an image in pixels.
    """

    def __init__(self, path: Path, num_samples: int, image_size: tuple[int, int]) -> None:
        self.path = path
        self.num_samples = num_samples
        self._image_shape = (*image_size, 3)
        self._image_bytes = int(np.prod(self._image_shape))
        self._partial = path.with_name(path.name + ".partial")
        self._written = path.with_name(path.name + ".written")
        self._files: tuple[int, int] | None = None

    @property
    def finished(self) -> bool:
        """Whether the final file is in place."""
        return self.path.exists()

    def create(self) -> None:
        """Make the unfinished files at their full size, unless they are there. Call in one process.

        Raises:
            UserError: Unfinished files of another size are there, or the disk is too small.
        """
        for path, size in (
            (self._partial, self.num_samples * self._image_bytes),
            (self._written, self.num_samples),
        ):
            if path.exists():
                if path.stat().st_size != size:
                    raise UserError(
                        f"an unfinished {path.name} must have {size} bytes, found {path.stat().st_size}; "
                        "remove it to start again"
                    )
                continue
            with path.open("wb") as file:
                file.truncate(size)

    def __enter__(self) -> Self:
        self._files = (os.open(self._partial, os.O_WRONLY), os.open(self._written, os.O_RDWR))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._files is not None
        for file in self._files:
            os.close(file)
        self._files = None

    def pending(self) -> NDArray[np.int64]:
        """Return the numbers of the samples that are not written yet, ascending."""
        written = np.frombuffer(self._written.read_bytes(), dtype=np.uint8)
        return np.flatnonzero(written == 0).astype(np.int64)

    def write(self, numbers: Sequence[int] | NDArray[np.int64], images: NDArray[np.uint8]) -> None:
        """Put images in place, then note that they are there.

        Args:
            numbers: Sample numbers, int [b].
            images: uint8 [b, H, W, 3].
        """
        assert self._files is not None, "open the file with `with` first"
        assert images.dtype == np.uint8, images.dtype
        assert images.shape[1:] == self._image_shape, images.shape
        data, marks = self._files
        for number, image in zip(numbers, images, strict=True):
            os.pwrite(data, np.ascontiguousarray(image).data, int(number) * self._image_bytes)
        # A mark must never outlive its image, also not after a power cut.
        os.fdatasync(data)
        for number in numbers:
            os.pwrite(marks, b"\x01", int(number))

    def finish(self) -> None:
        """Turn the complete images into the final file and drop the unfinished ones. Call in one process."""
        missing = self.pending()
        assert len(missing) == 0, f"{len(missing)} samples are missing"
        self._drop_temporaries()
        header = {
            "descr": "|u1",
            "fortran_order": False,
            "shape": (self.num_samples, *self._image_shape),
        }
        with (
            self._partial.open("rb") as images,
            replacing(self.path) as target,
            zipfile.ZipFile(target, "w") as archive,
            archive.open(_MEMBER, "w", force_zip64=True) as member,
        ):
            np.lib.format.write_array_header_1_0(member, header)
            while chunk := images.read(_COPY_BYTES):
                member.write(chunk)
        self.drop_unfinished()

    def drop_unfinished(self) -> None:
        """Remove what the final file has replaced, also after a kill in between. Call in one process."""
        assert self.finished, self.path
        self._partial.unlink(missing_ok=True)
        self._written.unlink(missing_ok=True)
        self._drop_temporaries()

    def _drop_temporaries(self) -> None:
        """Remove what a kill in `finish` left, which is as large as the final file."""
        for path in self.path.parent.glob(f".{self.path.name}.*.tmp"):
            path.unlink(missing_ok=True)


def map_samples(path: Path, array: str = "arr_0") -> NDArray[np.uint8]:
    """Return the images of an .npz of samples as uint8 [n, H, W, 3], mapped from disk where they are not compressed.

    Raises:
        UserError: The file is truncated, is no .npz, or holds no such images.
    """
    member = f"{array}.npy"
    with open_npz(path) as archive:
        if member not in archive.namelist():
            raise UserError(f"samples must be in the array {array}, {path} holds {archive.namelist()[:8]}")
        entry = archive.getinfo(member)
        stored = entry.compress_type == zipfile.ZIP_STORED
        images = _map_stored(path, entry) if stored else read_array(archive, array)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise UserError(
            f"samples must be uint8 [n, H, W, 3], {path} holds {images.dtype} {list(images.shape)}"
        )
    return images


def _map_stored(path: Path, entry: zipfile.ZipInfo) -> NDArray[np.uint8]:
    with path.open("rb") as file:
        # Local file header: 30 fixed bytes, the last four being the lengths of name and extra field.
        # Source: PKWARE APPNOTE 6.3.9, section 4.3.7.
        file.seek(entry.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", file.read(4))
        start = entry.header_offset + 30 + name_length + extra_length
        file.seek(start)
        # What is mapped must be in the file.
        header = read_header(file, min(start + entry.file_size, path.stat().st_size))
        offset = file.tell()
    return np.memmap(
        path, dtype=header.dtype, mode="r", offset=offset, shape=header.shape, order=header.order
    )
