"""Where images to compare come from: whatever `pipeline encode` takes, a store, or an .npz of samples.

Each answers the same question, images `start` to `stop` as uint8 [n, H, W, 3] of one size, so that a feature
pass does not care which it reads.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from eval.command import warn
from eval.images.samples import map_samples
from shards import (
    BadImageError,
    FoundImage,
    SourceReader,
    Store,
    UsageError,
    UserError,
    center_crop,
    decode_image,
    find_images,
    is_store,
    open_store,
    usable_cores,
)

SourceKind = Literal["folder", "files", "store", "samples"]
_MOST_THREADS = 16
"""Threads a process decodes a folder with at most, on a machine of many cores."""


class ImageSource(Protocol):
    """A numbered set of images of one size."""

    kind: SourceKind
    path: Path
    image_size: tuple[int, int]
    """Height and width in pixels."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Return images `start` to `stop`, uint8 [stop − start, H, W, 3]."""
        ...

    def read_some(self, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return images by their numbers, int64 [n]: uint8 [n, H, W, 3]."""
        ...


class SourceImages:
    """Every image that `pipeline encode` finds in a source, in the order of their keys, centre-cropped to one size.

    Several threads decode, because one would hold up the network the images are for.

    Args:
        path: An image folder, or tar, parquet or csv files, as `pipeline encode` takes them.
        image_size: Height and width to crop to; both the same, as the crop is square.

    Raises:
        UsageError: There is no image in it.
    """

    def __init__(self, path: Path, image_size: tuple[int, int]) -> None:
        self.path = path
        self.image_size = image_size
        if image_size[0] != image_size[1]:
            raise UsageError(f"images are cropped to squares, but {image_size[0]}×{image_size[1]} was needed")
        self.kind: SourceKind = "folder" if path.is_dir() else "files"
        found = find_images(str(path))
        self._images = found.images
        self._reader = SourceReader()
        if os.environ.get("RANK", "0") == "0":
            for note in found.notes:
                warn(f"{path}: {note}")

    def __len__(self) -> int:
        return len(self._images)

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Return images `start` to `stop`, cropped.

        Raises:
            UserError: An image cannot be used.
        """
        return self._decoded(self._images[start:stop])

    def read_some(self, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return images by their numbers, cropped.

        Raises:
            UserError: An image cannot be used.
        """
        return self._decoded([self._images[number] for number in numbers])

    def _decoded(self, images: Sequence[FoundImage]) -> NDArray[np.uint8]:
        with ThreadPoolExecutor(decoding_threads()) as pool:
            return np.stack(list(pool.map(self._read, images)))

    def _read(self, image: FoundImage) -> NDArray[np.uint8]:
        try:
            return center_crop(decode_image(self._reader.read(image)), self.image_size[0])
        except (BadImageError, UserError, OSError, ValueError) as error:
            raise UserError(
                f"{self.path}/{image.key} is not a readable image ({error}); repair or remove it"
            ) from error


class StoreImages:
    """The valid rows of a store, as stored for its centre view.

    Raises:
        UserError: The store keeps no images.
    """

    kind: SourceKind = "store"

    def __init__(self, path: Path, rows: NDArray[np.int64] | None = None) -> None:
        self.path = path
        self.store: Store = open_store(path)
        if not self.store.image_size:
            raise UserError(f"{path} was encoded without images; encode it with --image-size")
        self.image_size = (self.store.image_size, self.store.image_size)
        self._rows = self.store.valid_rows if rows is None else rows
        self._reader = self.store.reader("center", "image")

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Return the images of valid rows `start` to `stop`."""
        return self._images(self._rows[start:stop])

    def read_some(self, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the images of valid rows by their numbers."""
        return self._images(self._rows[numbers])

    def _images(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        images = np.empty((len(rows), *self._reader.row_shape), np.uint8)
        self._reader.read(rows, images)
        return images


class NpzImages:
    """The samples in an .npz, mapped from disk."""

    kind: SourceKind = "samples"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._images = map_samples(path)
        self.image_size = (self._images.shape[1], self._images.shape[2])

    def __len__(self) -> int:
        return len(self._images)

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Return images `start` to `stop`, copied out of the file."""
        return np.array(self._images[start:stop])

    def read_some(self, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return images by their numbers, copied out of the file."""
        return np.array(self._images[numbers])


def decoding_threads() -> int:
    """Return the number of threads a process decodes with: its share of this machine's usable cores, at most 16."""
    return max(1, min(_MOST_THREADS, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def open_images(path: Path, image_size: tuple[int, int]) -> ImageSource:
    """Open a store, an .npz of samples, or what `pipeline encode` takes, whose images have this height and width.

    Raises:
        UsageError: The path is none of them, or its images have another size.
    """
    source: ImageSource
    if is_store(path):
        source = StoreImages(path)
    elif path.suffix == ".npz" and path.is_file():
        source = NpzImages(path)
    else:
        source = SourceImages(path, image_size)
    if source.image_size != image_size:
        theirs, ours = ("×".join(map(str, size)) for size in (source.image_size, image_size))
        raise UsageError(
            f"images to compare must have one size, {path} has {theirs} pixels and ours are {ours}"
        )
    return source


def blocks(start: int, stop: int, size: int) -> Iterable[tuple[int, int]]:
    """Return the range cut into consecutive blocks of at most `size`."""
    return ((first, min(first + size, stop)) for first in range(start, stop, size))
