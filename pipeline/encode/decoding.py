"""Reading and decoding the images of a shard in threads, into reused buffers."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.encode.claims import Task
from pipeline.sources.picture_sources import PictureSource
from pipeline.sources.pictures import Images
from shards import BadImageError, SourceRecord, UndecodableImageError


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
class DecodedBatch:
    """Consecutive rows of a shard on their way through the decoder.

    Attributes:
        task: The shard they belong to.
        first_place: Place of the first row in its shard.
        images: uint8 [V, b, P, P, 3], the pictures of all views (`pipeline.sources.pictures`), those the task needs
            filled by the time `rows` returns; slots of unusable images and behind the last image hold zeros.
        last: Whether the shard ends with this batch.
        views_written: How many of the task's views the store has of it.
    """

    task: Task
    first_place: int
    images: Tensor
    last: bool
    pending: list[Future[DecodedRow]] = field(default_factory=list)
    views_written: int = 0

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


class BatchDecoder:
    """Decodes rows into buffers, ahead of the encoder.

    Args:
        source: Gives what the views show.
        length: Rows of every batch.
        threads: How many images are decoded at once.
        pin_memory: Put pictures where a GPU can fetch them by itself.
    """

    def __init__(
        self,
        source: PictureSource,
        *,
        length: int,
        threads: int,
        pin_memory: bool = False,
    ) -> None:
        self._source = source
        self._length = length
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._pin_memory = pin_memory
        self._free: list[Tensor] = []

    def close(self) -> None:
        """Stops the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def batches(self, task: Task, records: list[SourceRecord]) -> Iterator[DecodedBatch]:
        """Starts decoding a shard batch by batch, as the iterator is advanced; advancing never waits."""
        for first in range(0, len(records), self._length):
            part = records[first : first + self._length]
            images = self._free.pop() if self._free else self._new()
            batch = DecodedBatch(task, first, images, first + len(part) == len(records))
            pictures = images.numpy()
            pictures[:, len(part) :] = 0
            batch.pending += [
                self._pool.submit(self._decode, record, task.views, pictures[:, slot])
                for slot, record in enumerate(part)
            ]
            yield batch

    def recycle(self, batch: DecodedBatch) -> None:
        """Takes a batch's buffer back once nobody reads it any more."""
        self._free.append(batch.images)

    def _new(self) -> Tensor:
        size = self._source.pictures.size
        shape = (len(self._source.pictures.names), self._length, size, size, 3)
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin_memory)

    def _decode(self, record: SourceRecord, views: tuple[str, ...], out: Images) -> DecodedRow:
        began = time.perf_counter()
        read = began
        try:
            content = self._source.read(record, views)
            read = time.perf_counter()
            self._source.draw(content, record, views, out)
            reason = None
        except (BadImageError, UndecodableImageError) as error:
            out[:] = 0
            reason = str(error)
        return DecodedRow(reason, read - began, time.perf_counter() - read)
