"""One worker: decode threads → encoder → writer threads, so that the device never waits for the disk.

The control flow is one thread. It keeps batches decoding ahead of the encoder, also across the border from one
shard to the next, starts the encoder on the oldest one and hands the tokens to the view's writer thread; rings of
reused buffers bound the memory.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from numpy.typing import NDArray

from pipeline.encode.claims import Claims, Task
from pipeline.encode.decoding import DecodedBatch, RowBatches
from pipeline.encode.progress import BatchEncoded, BatchWritten, Event, ShardFailed
from pipeline.encode.tokens import StoredTokens, TokenStorage
from pipeline.encoders.latents import RowEncoder
from shards import ShardWriter, StoreWriter, UserError

# What a device, a library or a source may raise for one shard while others still succeed. Anything else is a
# fault of the program and ends the worker.
SHARD_FAILURES = (OSError, RuntimeError, ValueError)

_BATCHES_AHEAD = 3
_TOKEN_BUFFERS = 4
_GIVE_UP_AFTER = 5
"""Shards that fail one after another, and nothing is written in between: the fault is not theirs."""


class WorkerGivesUpError(UserError):
    """One worker cannot do what others perhaps can; they are to go on without it."""


class ShardFailureError(Exception):
    """Work on a shard broke off; the cause is the exception it was raised from."""

    def __init__(self, task: Task) -> None:
        super().__init__(f"shard {task.shard}")
        self.task = task


@dataclass
class _Encoded:
    """Tokens of one view of a batch, on their way back from the device."""

    batch: DecodedBatch
    view: str
    tokens: StoredTokens
    ready: torch.cuda.Event | None
    bad: dict[int, str]


class Worker:
    """Encodes shards with one encoder on one device, until none is left.

    Args:
        encoder: Already on its device.
        writer: The store.
        rows: Gives what is encoded; closed with the worker.
        claims: Says which shard comes next.
        report: Takes news for the progress line and log.
        name: Name of this worker in the news.
        length: Rows of every batch of `rows`.
    """

    def __init__(
        self,
        encoder: RowEncoder,
        writer: StoreWriter,
        rows: RowBatches,
        claims: Claims,
        report: Callable[[Event], None],
        *,
        name: str,
        length: int,
    ) -> None:
        self._encoder = encoder
        self._device = encoder.device
        self._writer = writer
        self._claims = claims
        self._report = report
        self._name = name
        recipe = writer.recipe
        self._length = length
        self._rows = rows
        self._storage = TokenStorage(recipe.dtype, writer.code)
        self._free_tokens: queue.SimpleQueue[StoredTokens] = queue.SimpleQueue()
        for _ in range(_TOKEN_BUFFERS):
            self._free_tokens.put(self._new_token_buffer())
        # A view's shards are files of their own: one thread each keeps their batches in order.
        self._write_pools = {
            view: ThreadPoolExecutor(1, thread_name_prefix=f"store-writer {view}") for view in recipe.views
        }
        self._written_lock = threading.Lock()
        self._failed_in_a_row: set[int] = set()
        self._writing: deque[tuple[Task, Future[None]]] = deque()
        self._window: deque[DecodedBatch] = deque()
        self._open: dict[tuple[int, str], ShardWriter] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as last:  # all of it, even on a device that is beyond use
            for pool in self._write_pools.values():
                last.callback(pool.shutdown)
            last.callback(self._rows.close)
            last.callback(self._claims.give_back)
            last.callback(self._drop_in_flight)

    @property
    def _pinned(self) -> bool:
        return self._device.type == "cuda"

    def _new_token_buffer(self) -> StoredTokens:
        encoder = self._writer.recipe.encoder
        shape = (self._length, encoder.num_tokens, encoder.width)
        return self._storage.empty(shape, pin_memory=self._pinned)

    def run(self) -> None:
        """Takes shards and encodes them until nothing is left that this worker could do.

        A shard that fails is given back and counted; the others go on.

        Raises:
            UserError: If the source is gone, the disk is full, or something else stops all shards.
            WorkerGivesUpError: If this worker fails with one shard after another, so that it would use up the
                attempts that others could make.
        """
        while not self._claims.finished():
            try:
                self._encode_available()
            except ShardFailureError as failure:
                self._drop_in_flight()
                reason = f"{type(failure.__cause__).__name__}: {failure.__cause__}"
                self._claims.failed(failure.task, reason)
                self._claims.give_back()
                self._report(ShardFailed(self._name, failure.task.shard, reason))
                self._failed_in_a_row.add(failure.task.shard)
                if len(self._failed_in_a_row) >= _GIVE_UP_AFTER:
                    raise WorkerGivesUpError(
                        f"{self._name} gives up: {_GIVE_UP_AFTER} shards have failed here one after another, the last "
                        f"with {reason}; see to this device and its disks, then run the same command again"
                    ) from failure
            else:
                if not self._claims.finished():
                    self._claims.wait()

    def _encode_available(self) -> None:
        """Encodes all shards there are to be had now."""
        batches = self._batches()
        while True:
            while len(self._window) < _BATCHES_AHEAD and (batch := next(batches, None)) is not None:
                self._window.append(batch)
            if not self._window:
                break
            self._encode(self._window[0])
            self._window.popleft()
        while self._writing:
            self._collect_written()

    def _batches(self) -> Iterator[DecodedBatch]:
        while (task := self._claims.next()) is not None:
            yield from self._rows.batches(task, self._writer.plan.records_of(task.shard))

    def _encode(self, batch: DecodedBatch) -> None:
        began = time.perf_counter()
        try:
            rows = batch.rows()
            decoded = time.perf_counter()
            inputs = batch.inputs.to(self._device, non_blocking=self._pinned)
            for view in batch.task.views:
                tokens = self._free_tokens.get()
                shown = self._rows.shown(inputs, view)
                tokens.copy_(self._storage(self._encoder.encode(shown)), non_blocking=self._pinned)
                reasons = ((slot, row.reason_in(view)) for slot, row in enumerate(rows))
                bad = {batch.first_place + slot: reason for slot, reason in reasons if reason is not None}
                encoded = _Encoded(batch, view, tokens, self._mark(), bad)
                self._writing.append((batch.task, self._write_pools[view].submit(self._write, encoded)))
        except SHARD_FAILURES as error:
            raise ShardFailureError(batch.task) from error
        self._report(
            BatchEncoded(
                self._name,
                batch.task.shard,
                rows=len(rows),
                bad=sum(any(row.reason_in(view) for view in batch.task.views) for row in rows),
                read_seconds=sum(row.read_seconds for row in rows),
                decode_seconds=sum(row.decode_seconds for row in rows),
                wait_seconds=decoded - began,
                encode_seconds=time.perf_counter() - decoded,
            )
        )
        while self._writing and (len(self._writing) > _TOKEN_BUFFERS or self._writing[0][1].done()):
            self._collect_written()

    def _mark(self) -> torch.cuda.Event | None:
        """What happens on the device once everything asked of it so far is done; None where calls return only then."""
        if not self._pinned:
            return None
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        # The stream of the worker's own device: by default it would be that of whichever is current.
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _collect_written(self) -> None:
        task, future = self._writing.popleft()
        try:
            future.result()
        except SHARD_FAILURES as error:
            raise ShardFailureError(task) from error

    def _write(self, encoded: _Encoded) -> None:
        """Runs in the view's writer thread."""
        batch, key = encoded.batch, (encoded.batch.task.shard, encoded.view)
        with ExitStack() as guard:
            try:
                if encoded.ready is not None:
                    encoded.ready.synchronize()
                began = time.perf_counter()
                shard = self._open.pop(key, None)
                if shard is None:
                    task = batch.task
                    linked = self._rows.linked(task, encoded.view)
                    shard = self._writer.shard(
                        encoded.view, task.shard, attempts=task.attempt, linked=linked
                    ).__enter__()
                guard.push(shard)
                self._write_rows(shard, encoded)
            finally:
                self._free_tokens.put(encoded.tokens)  # the device goes on while the shard is published
            if batch.last:
                shard.publish()
            else:
                self._open[key] = shard
                guard.pop_all()  # the shard stays open for its next batch
        self._count_written(batch)
        seconds = time.perf_counter() - began
        self._report(BatchWritten(self._name, batch.task.shard, encoded.view, seconds, published=batch.last))

    def _count_written(self, batch: DecodedBatch) -> None:
        """Takes note that one more view of a batch is written; with the last one the batch is done with."""
        with self._written_lock:
            self._failed_in_a_row.clear()
            batch.views_written += 1
            if batch.views_written < len(batch.task.views):
                return
        self._rows.recycle(batch)
        if batch.last:
            self._claims.done(batch.task)

    def _write_rows(self, shard: ShardWriter, encoded: _Encoded) -> None:
        batch = encoded.batch
        recipe = self._writer.recipe
        arrays: dict[str, NDArray[Any]] = {"tokens": encoded.tokens.as_numpy()}
        images = self._rows.images(batch, encoded.view) if "image" in recipe.fields(encoded.view) else None
        if images is not None:
            arrays["image"] = images
        good = [slot for slot in range(batch.length) if batch.first_place + slot not in encoded.bad]
        for run in _consecutive(good):
            block = {name: array[run.start : run.stop] for name, array in arrays.items()}
            shard.write_block(batch.first_place + run.start, block)
            if encoded.tokens.square_error is not None:
                # Row by row, so that the sum does not depend on the batches.
                for square_error in encoded.tokens.square_error[run.start : run.stop].numpy():
                    shard.add_square_error(square_error)
        for place, reason in encoded.bad.items():
            shard.quarantine(place, reason)

    def _drop_in_flight(self) -> None:
        """Stops all work in hand and removes what was written of unfinished shards."""
        for batch in self._window:
            batch.cancel()
        self._window.clear()
        for _, future in self._writing:
            if not future.cancel():
                future.exception()
        self._writing.clear()
        for shard in self._open.values():
            shard.__exit__(None, None, None)
        self._open.clear()
        while self._free_tokens.qsize() < _TOKEN_BUFFERS:  # a cancelled write never gave its buffer back
            self._free_tokens.put(self._new_token_buffer())


def _consecutive(slots: list[int]) -> Iterator[range]:
    """The runs of consecutive numbers in an ascending list."""
    begin = 0
    for index in range(1, len(slots) + 1):
        if index == len(slots) or slots[index] != slots[index - 1] + 1:
            yield range(slots[begin], slots[index - 1] + 1)
            begin = index
