"""Batches of a store for training: the stream's next rows, read by threads into a ring of reused buffers.

There is nothing to decode, so worker processes would only add copies; reading releases the interpreter's
lock.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from shards.errors import UsageError
from shards.reading.reader import RowReader, Verify
from shards.reading.ring import Job, Ring
from shards.reading.schedule import MicroBatch, Schedule
from shards.reading.shard_file import ReadMode
from shards.reading.store import Store

Allocate = Callable[[tuple[int, ...], np.dtype[Any]], NDArray[Any]]

_PAGE = 4096
_PIECE = 8  # rows a thread takes at a time, of large ones: a few milliseconds of work
_PIECES_NBYTES = 1 << 23  # of small ones as many as this, shared by the threads: a piece costs some 15 µs


@dataclass(frozen=True)
class Batch:
    """One micro-batch of a rank.

    Attributes:
        step: Number of the global batch it belongs to.
        positions: Stream position of each sample, int64[b].
        rows: Row of each sample, int64[b].
        views: Index of each sample's view in the loader's ``views``, int8[b].
        labels: Class of each sample, int32[b]; -1 where there is none.
        arrays: By field, the stored rows [b, *row_shape]. They are in a reused buffer and must not be touched
            after `release`.
        last_of_step: Whether the rank's share of the global batch ends here.
    """

    step: int
    positions: NDArray[np.int64]
    rows: NDArray[np.int64]
    views: NDArray[np.int8]
    labels: NDArray[np.int32]
    arrays: dict[str, NDArray[Any]]
    last_of_step: bool
    release: Callable[[], None]
    """Says that the arrays are no longer needed; may be called twice."""


def page_aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return an uninitialised array that begins on a memory page.

    numpy's own begin 16 bytes behind one, which makes copying from a page-aligned row up to 1.7 times slower.
    """
    nbytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(nbytes + _PAGE, np.uint8)
    start = -raw.ctypes.data % _PAGE
    return raw[start : start + nbytes].view(dtype).reshape(shape)


class Loader:
    """Iterates over one rank's batches of the infinite stream, for ever, from any position.

    Args:
        store: The store, or several as one (`shards.reading.mixed_store.MixedStore`).
        fields: Fields to deliver; without any, batches are rows and labels, and nothing is read of the shards.
        views: Views to draw from; each sample's view is a function of (seed, position).
        rows: Rows of an epoch, ascending; by default every valid row.
        seed: Names the order and the draws.
        global_batch_size: Samples of a step, over all ranks (B).
        rank: This process's number.
        world_size: Number of processes.
        micro_batch_size: Most samples of a batch; by default the rank's whole share of a step.
        start_sample: Stream position to begin at; a multiple of ``global_batch_size``.
        threads: Threads that read.
        ring: Buffers; as many batches can be ready or in use at once.
        allocate: Makes a buffer of a shape and type, for instance a pinned one.
        group: How far rows are mixed; see `RowOrder`.
        mode: How bytes are read; see `shards.reading.shard_file`.
        verify: When a row's checksum is compared; see `shards.reading.reader.Verify`.

    Attributes:
        order: The stream of rows.
    """

    def __init__(
        self,
        store: Store,
        *,
        fields: Sequence[str] = ("tokens",),
        views: Sequence[str] = ("center", "flip"),
        rows: NDArray[np.int64] | None = None,
        seed: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        micro_batch_size: int | None = None,
        start_sample: int = 0,
        threads: int = 2,
        ring: int = 4,
        allocate: Allocate = page_aligned,
        group: int | None = None,
        mode: ReadMode = "auto",
        verify: Verify = "first",
    ) -> None:
        if threads < 1 or ring < 2:
            raise UsageError(f"a loader needs at least 1 thread and 2 buffers, not {threads} and {ring}")
        if not views:
            raise UsageError("a loader needs at least one view")
        rows = store.valid_rows if rows is None else rows
        self.order = store.order(rows, seed=seed, group=group, global_batch_size=global_batch_size)
        self._schedule = Schedule(
            order=self.order,
            seed=seed,
            num_views=len(views),
            global_batch_size=global_batch_size,
            rank=rank,
            world_size=world_size,
            micro_batch_size=micro_batch_size,
            start_sample=start_sample,
        )
        self._views = tuple(views)
        self._labels = store.labels
        self._readers: dict[str, list[RowReader]] = {
            field: [store.reader(view, field, mode=mode, verify=verify) for view in self._views]
            for field in fields
        }
        for field, readers in self._readers.items():
            if len({(r.row_shape, r.dtype) for r in readers}) != 1:
                raise UsageError(f"views {', '.join(self._views)} hold {field!r} of different shapes")
        self._allocate = allocate
        # Rows from a server are asked for a batch at a time, and for every buffer at once, to hide the way there.
        row_nbytes = sum(int(np.prod(r[0].row_shape)) * r[0].dtype.itemsize for r in self._readers.values())
        piece = max(_PIECE, _PIECES_NBYTES // (max(1, row_nbytes) * threads))
        self._piece = self._schedule.largest if store.is_remote else piece
        self._threads = max(threads, ring) if store.is_remote else threads
        self._num_slots = ring
        self._ring: Ring[MicroBatch] | None = None
        self._buffers: list[dict[str, NDArray[Any]]] = []
        self._closer: weakref.finalize[Any, Any] | None = None

    @property
    def data_wait(self) -> float:
        """Seconds the consumer has waited for batches so far."""
        return self._ring.waited if self._ring is not None else 0.0

    def __iter__(self) -> Iterator[Batch]:
        """Begin to read ahead and yield batches without end; only one iteration of a loader at a time."""
        self.close()
        self._buffers = [
            {
                field: self._allocate((self._schedule.largest, *readers[0].row_shape), readers[0].dtype)
                for field, readers in self._readers.items()
            }
            for _ in range(self._num_slots)
        ]
        ring = Ring(
            plan=_Planner(self._schedule),
            fill=_Filler(self._readers, self._buffers),
            num_slots=self._num_slots,
            num_threads=self._threads,
            piece=self._piece,
        )
        self._ring = ring
        self._closer = weakref.finalize(self, ring.close)
        ring.start()
        return self._batches(ring)

    def close(self) -> None:
        """Stop reading ahead; buffers are not written to afterwards."""
        if self._closer is not None:
            self._closer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _batches(self, ring: Ring[MicroBatch]) -> Iterator[Batch]:
        while True:
            job = ring.take()
            content = job.content
            yield Batch(
                step=content.step,
                positions=content.positions,
                rows=content.rows,
                views=content.views,
                labels=self._labels[content.rows],
                arrays={field: buffer[: job.size] for field, buffer in self._buffers[job.slot].items()},
                last_of_step=content.last_of_step,
                release=_Release(ring, job.slot),
            )


# Neither of these may hold the loader itself: a loader that is dropped must stop its threads.
@dataclass(frozen=True)
class _Planner:
    schedule: Schedule

    def __call__(self, number: int) -> tuple[MicroBatch, int]:
        content = self.schedule.micro_batch(number)
        return content, len(content.rows)


@dataclass(frozen=True)
class _Filler:
    readers: dict[str, list[RowReader]]
    buffers: list[dict[str, NDArray[Any]]]

    def __call__(self, job: Job[MicroBatch], first: int, last: int) -> None:
        rows = job.content.rows[first:last]
        views = job.content.views[first:last]
        for field, readers in self.readers.items():
            out = self.buffers[job.slot][field]
            for view, reader in enumerate(readers):
                chosen = np.flatnonzero(views == view)
                if len(chosen):
                    reader.read(rows[chosen], out, chosen + first)


class _Release:
    """Gives a slot back, once."""

    def __init__(self, ring: Ring[MicroBatch], slot: int) -> None:
        self._ring = ring
        self._slot = slot
        self._held = True

    def __call__(self) -> None:
        if self._held:
            self._held = False
            self._ring.give_back(self._slot)
