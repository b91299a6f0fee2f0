"""Reading and decoding the images of a shard in threads, into reused buffers."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.claims import Task
from pipeline.sources.reading import BadImageError, SourceReader
from shards.errors import UndecodableImageError
from shards.identity import EncoderIdentity, Recipe
from shards.images import center_crop, decode_image
from shards.plan import SourceRecord

Images = NDArray[np.uint8]

_PIXELS_PER_TOKEN = 16
_LONGEST = 100
"""A picture longer than this, in units of its shorter side, would take gigabytes when that side is scaled up."""


@dataclass(frozen=True)
class DecodedRow:
    """What became of one image.

    Attributes:
        reason: Why it cannot be used, or None if it can.
        read_seconds: Time spent reading its bytes.
        decode_seconds: Time spent decoding and cropping it.
    """

    reason: str | None
    read_seconds: float
    decode_seconds: float


@dataclass
class Batch:
    """Consecutive rows of a shard on their way through the decoder.

    Attributes:
        task: The shard they belong to.
        first_place: Place of the first row in its shard.
        images: uint8 [b, P, P, 3], filled by the time `rows` returns; slots of unusable images and behind the last
            image hold zeros.
        last: Whether the shard ends with this batch.
        buffer: What `images` lies in, as the allocator gave it.
    """

    task: Task
    first_place: int
    images: Images
    last: bool
    buffer: Any
    pending: list[Future[DecodedRow]] = field(default_factory=list)

    def rows(self) -> list[DecodedRow]:
        """What became of each image; waits for all of them.

        Raises:
            OSError: If the source's device fails.
            SourceGoneError: If the source is gone.
        """
        return [future.result() for future in self.pending]

    def cancel(self) -> None:
        """Stops work that has not begun and waits for what has."""
        for future in self.pending:
            if not future.cancel():
                future.exception()


def batch_length(capacity: int, at_most: int) -> int:
    """Rows of a batch: shards of `capacity` rows cut into the fewest equal batches of no more than `at_most` rows.

    It depends on nothing else, so that a shard is encoded in the same batches whoever does it and however often.
    """
    num_batches = -(-capacity // at_most)
    return -(-capacity // num_batches)


def crop_size(recipe: Recipe) -> int:
    """Side of the crop that tokens are made from, also where it is not stored: tokens do not depend on that."""
    return recipe.image_size or default_crop(recipe.encoder)


def default_crop(encoder: EncoderIdentity) -> int:
    """Side of the crop that fits an encoder: what a decoder with patches of 16 pixels gives back."""
    return _PIXELS_PER_TOKEN * encoder.grid[0]


def usable_crop(content: bytes, size: int) -> Images:
    """The centre crop of an image file, uint8 [size, size, 3].

    Raises:
        UndecodableImageError: If it is not one whole image.
        BadImageError: If it is too long and thin.
    """
    image = decode_image(content)
    shorter, longer = sorted(image.shape[:2])
    if longer > _LONGEST * shorter:
        raise BadImageError(f"{longer} pixels are more than {_LONGEST} times the other side's {shorter}")
    return center_crop(image, size)


class BatchDecoder:
    """Decodes rows into buffers, ahead of the encoder.

    Args:
        reader: Gives the bytes of an image.
        image_size: Side P of the centre crop, in pixels.
        length: Rows of every batch.
        threads: How many images are decoded at once.
        allocate: Gives an array of the shape asked for and the object it lies in; it may be pinned memory.
    """

    def __init__(
        self,
        reader: SourceReader,
        *,
        image_size: int,
        length: int,
        threads: int,
        allocate: Callable[[tuple[int, ...]], tuple[Images, Any]],
    ) -> None:
        self._reader = reader
        self._image_size = image_size
        self._length = length
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._allocate = allocate
        self._free: list[tuple[Images, Any]] = []

    def close(self) -> None:
        """Stops the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def batches(self, task: Task, records: list[SourceRecord]) -> Iterator[Batch]:
        """Starts decoding a shard batch by batch, as the iterator is advanced; advancing never waits."""
        for first in range(0, len(records), self._length):
            part = records[first : first + self._length]
            images, buffer = self._free.pop() if self._free else self._new()
            batch = Batch(task, first, images, first + len(part) == len(records), buffer)
            images[len(part) :] = 0
            batch.pending += [
                self._pool.submit(self._decode, record, images[slot]) for slot, record in enumerate(part)
            ]
            yield batch

    def recycle(self, batch: Batch) -> None:
        """Takes a batch's buffer back once nobody reads it any more."""
        self._free.append((batch.images, batch.buffer))

    def _new(self) -> tuple[Images, Any]:
        return self._allocate((self._length, self._image_size, self._image_size, 3))

    def _decode(self, record: SourceRecord, out: Images) -> DecodedRow:
        began = time.perf_counter()
        read = began
        try:
            content = self._reader.read(record)
            read = time.perf_counter()
            out[:] = usable_crop(content, self._image_size)
            reason = None
        except (BadImageError, UndecodableImageError) as error:
            out[:] = 0
            reason = str(error)
        return DecodedRow(reason, read - began, time.perf_counter() - read)
