"""What the rows of a shard are encoded from, batch by batch, read in threads into reused buffers."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.encode.buffers import page_aligned
from pipeline.encode.claims import Task
from pipeline.sources.crop_sources import CropSource
from pipeline.sources.crops import Images
from shards import BadImageError, CommitRecord, SourceRecord, UndecodableImageError


@dataclass(frozen=True)
class DecodedRow:
    """What became of one row.

    Attributes:
        reason: Why it cannot be used in any view, or None.
        read_seconds: Time spent reading its bytes.
        decode_seconds: Time spent decoding and cropping it.
        reasons: Why it cannot be used in some views, by view.
    """

    reason: str | None
    read_seconds: float
    decode_seconds: float
    reasons: Mapping[str, str] = field(default_factory=dict)

    def reason_in(self, view: str) -> str | None:
        """Return why it cannot be used in a view, or None if it can."""
        return self.reason or self.reasons.get(view)


@dataclass
class DecodedBatch:
    """Consecutive rows of a shard on their way to the encoder.

    Attributes:
        task: The shard they belong to.
        first_slot: Slot of the first row in its shard.
        length: Number of rows.
        inputs: What all views are encoded from, [V, b, ...], those the task needs filled by the time `rows` returns;
            slots of unusable rows and behind the last row hold zeros. Of images: crops uint8 [V, b, P, P, 3].
        last: Whether the shard ends with this batch.
        views_written: How many of the task's views the store has of it.
    """

    task: Task
    first_slot: int
    length: int
    inputs: Tensor
    last: bool
    pending: list[Future[list[DecodedRow]]] = field(default_factory=list)
    views_written: int = 0

    def rows(self) -> list[DecodedRow]:
        """Wait for all rows; return the outcome of each.

        Raises:
            OSError: If the source's device fails.
            UserError: If the source is gone or damaged.
        """
        return [row for future in self.pending for row in future.result()]

    def cancel(self) -> None:
        """Cancel work that has not begun and wait for the rest."""
        for future in self.pending:
            if not future.cancel():
                future.exception()


def batch_length(capacity: int, at_most: int) -> int:
    """Return a batch's rows: shards of `capacity` rows cut into the fewest equal batches of at most `at_most` rows.

    It depends on nothing else, so that a shard is encoded in the same batches whoever does it and however often.
    """
    num_batches = -(-capacity // at_most)
    return -(-capacity // num_batches)


class RowBatches(ABC):
    """Reads rows into buffers, ahead of the encoder.

    Args:
        length: Rows of every batch.
        threads: How many reads are under way at once.
        pin_memory: Put buffers where a GPU can fetch them by itself.
    """

    def __init__(self, *, length: int, threads: int, pin_memory: bool = False) -> None:
        self._length = length
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._pin_memory = pin_memory
        self._free: list[Tensor] = []

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def batches(self, task: Task, records: list[SourceRecord]) -> Iterator[DecodedBatch]:
        """Start reading a shard batch by batch, as the iterator is advanced; advancing never waits."""
        for first in range(0, len(records), self._length):
            part = records[first : first + self._length]
            inputs = self._free.pop() if self._free else self._new()
            inputs[:, len(part) :] = 0
            batch = DecodedBatch(task, first, len(part), inputs, first + len(part) == len(records))
            batch.pending += self._start(batch, part)
            yield batch

    def blank(self) -> Tensor:
        """Return the inputs of a batch without rows."""
        return self._new().zero_()

    def recycle(self, batch: DecodedBatch) -> None:
        """Take a batch's buffer back once nobody reads it any more."""
        self._free.append(batch.inputs)

    @abstractmethod
    def shown(self, inputs: Tensor, view: str) -> Tensor:
        """Select the encoder's input for a view, [b, ...], from inputs [V, b, ...] on any device."""

    @abstractmethod
    def images(self, batch: DecodedBatch, view: str) -> NDArray[Any] | None:
        """Return crops uint8 [b, P, P, 3] to store of a view that stores its own; None if they are `linked`."""

    def linked(self, task: Task, view: str) -> Callable[[], CommitRecord] | None:
        """Return the commit record of the shard whose images the written store links to; None if it links to none."""
        return None

    @abstractmethod
    def _new(self) -> Tensor:
        """Return a buffer for the inputs of a batch."""

    @abstractmethod
    def _start(self, batch: DecodedBatch, records: Sequence[SourceRecord]) -> list[Future[list[DecodedRow]]]:
        """Start filling a batch's buffer; return a future for each row, in order."""


class BatchDecoder(RowBatches):
    """Decodes images; see `RowBatches` for the other arguments.

    Args:
        source: Gives what the views show.
    """

    def __init__(self, source: CropSource, *, length: int, threads: int, pin_memory: bool = False) -> None:
        super().__init__(length=length, threads=threads, pin_memory=pin_memory)
        self._source = source

    def shown(self, inputs: Tensor, view: str) -> Tensor:
        """See `RowBatches.shown`: pixels uint8 [b, 3, P, P]."""
        return self._source.crops.shown(inputs, view)

    def images(self, batch: DecodedBatch, view: str) -> NDArray[Any] | None:
        """See `RowBatches.images`."""
        return self._source.crops.stored(batch.inputs.numpy(), view)

    def _new(self) -> Tensor:
        size = self._source.crops.size
        shape = (len(self._source.crops.names), self._length, size, size, 3)
        return page_aligned(shape, torch.uint8, pin_memory=self._pin_memory)

    def _start(self, batch: DecodedBatch, records: Sequence[SourceRecord]) -> list[Future[list[DecodedRow]]]:
        crops, views = batch.inputs.numpy(), batch.task.views
        return [
            self._pool.submit(self._decode, record, views, crops[:, slot])
            for slot, record in enumerate(records)
        ]

    def _decode(self, record: SourceRecord, views: tuple[str, ...], out: Images) -> list[DecodedRow]:
        began = time.perf_counter()
        read = began
        try:
            content = self._source.read(record, views)
            read = time.perf_counter()
            self._source.cut(content, record, views, out)
            reason = None
        except (BadImageError, UndecodableImageError) as error:
            out[:] = 0
            reason = str(error)
        return [DecodedRow(reason, read - began, time.perf_counter() - read)]
