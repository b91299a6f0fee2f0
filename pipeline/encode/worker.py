"""One worker: decode threads → encoder → writer threads, so that the device never waits for the disk.

The control flow is one thread. It keeps batches decoding ahead of the encoder, also across the border from one
shard to the next, starts the encoder on the oldest one and hands the tokens to the view's writer thread; rings of
reused buffers bound the memory.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.encode.claims import Claims, Task
from pipeline.encode.decoding import DecodedBatch, RowBatches
from pipeline.encode.progress import BatchEncoded, BatchWritten, Event, ShardFailed, WritersAdded
from pipeline.encode.sums import DeviceSums, TorchSums, sums_for
from pipeline.encode.targets import Target, outputs
from pipeline.encode.tokens import StoredTokens
from pipeline.encode.transfers import Mark, Transfers, seconds_between
from pipeline.encoders.latents import RowEncoder
from shards import Execution, ShardWriter, UserError

# What a device, a library or a source may raise for one shard while others still succeed. Anything else is a
# fault of the program and ends the worker.
SHARD_FAILURES = (OSError, RuntimeError, ValueError)

_BATCHES_AHEAD = 3
_TOKEN_BUFFERS = 4
_BUFFERS_A_SHARD = 2
"""Further token buffers for each further shard that is written at once."""
SHARE_WAITED = 0.1
"""Share of the time that the device may wait for writers before another shard is written beside the others."""
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
    """Tokens of one view of a batch for each target that lacks them, on their way back from the device."""

    batch: DecodedBatch
    view: str
    targets: list[int]
    buffers: list[StoredTokens]
    """One a target of the worker, whether it is used or not."""
    sums: list[TorchSums | None]
    """What adds up a shard's tokens in the place of its writer, in order of `targets`."""
    begun: Mark
    done: Mark
    """When the device began to compute them, and when it had."""
    ready: torch.cuda.Event | None
    bad: dict[int, str]


class Worker:
    """Encodes shards with one encoder on one device, until none is left.

    Args:
        encoder: Already on its device.
        targets: The stores to fill; the first has the images.
        rows: Gives what is encoded; closed with the worker.
        claims: Says which shard comes next.
        report: Takes news for the progress line and log.
        name: Name of this worker in the news.
        length: Rows of every batch of `rows`.
        most_shards: How many shards may be written at once, where one writer a view is slower than the device.
    """

    def __init__(
        self,
        encoder: RowEncoder,
        targets: Sequence[Target],
        rows: RowBatches,
        claims: Claims,
        report: Callable[[Event], None],
        *,
        name: str,
        length: int,
        most_shards: int = 1,
    ) -> None:
        self._encoder = encoder
        self._device = encoder.device
        self._transfers = Transfers(self._device)
        self._targets = targets
        self._writer = targets[0].writer
        self._claims = claims
        self._report = report
        self._name = name
        self._length = length
        self._rows = rows
        self._storage = [target.storage for target in targets]
        self._free_tokens: queue.SimpleQueue[list[StoredTokens]] = queue.SimpleQueue()
        self._num_buffers = self._buffer_nbytes = 0
        self._add_buffers(_TOKEN_BUFFERS)
        # A view's shards are files of their own: one thread each keeps their batches in order, and publishes a shard's
        # images before those who share them. Further shards at once have further threads.
        self._most_shards = most_shards
        self._write_pools: list[dict[str, ThreadPoolExecutor]] = []
        self._add_writers()
        self._pool_of: dict[int, int] = {}
        self._waited, self._judged = 0.0, time.perf_counter()
        self._written_lock = threading.Lock()
        self._failed_in_a_row: set[int] = set()
        self._writing: deque[tuple[Task, Future[None]]] = deque()
        self._window: deque[DecodedBatch] = deque()
        self._open: dict[tuple[int, str, int], ShardWriter] = {}
        self._lacking: dict[tuple[int, str], list[int]] = {}
        self._sums: dict[tuple[int, str, int], TorchSums | None] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as last:  # all of it, even on a device that is beyond use
            for pools in self._write_pools:
                for pool in pools.values():
                    last.callback(pool.shutdown)
            last.callback(self._rows.close)
            last.callback(self._claims.give_back)
            last.callback(self._drop_in_flight)

    @property
    def _pinned(self) -> bool:
        return self._device.type == "cuda"

    def _add_buffers(self, count: int) -> None:
        for _ in range(count):
            buffers = self._new_token_buffers()
            self._buffer_nbytes += sum(tokens.nbytes for tokens in buffers)
            self._free_tokens.put(buffers)
        self._num_buffers += count

    def _add_writers(self) -> None:
        number = len(self._write_pools)
        self._write_pools.append(
            {
                view: ThreadPoolExecutor(1, thread_name_prefix=f"store-writer {view} {number}")
                for view in self._writer.recipe.views
            }
        )

    def _widen(self) -> None:
        """Write one more shard at the same time if the device has waited for writers, and log it."""
        now = time.perf_counter()
        waited, since = self._waited, max(now - self._judged, 1e-9)
        self._waited, self._judged = 0.0, now
        if waited <= SHARE_WAITED * since or len(self._write_pools) >= self._most_shards:
            return
        self._add_writers()
        self._add_buffers(_BUFFERS_A_SHARD)
        self._report(WritersAdded(self._name, len(self._write_pools), self._buffer_nbytes, waited / since))

    def _new_token_buffers(self) -> list[StoredTokens]:
        recipe = self._writer.recipe
        shape = (self._length, recipe.encoder.num_tokens, recipe.encoder.width)
        return [
            storage.empty(shape, class_token=recipe.class_token, pin_memory=self._pinned)
            for storage in self._storage
        ]

    def try_out(self, execution: Execution) -> None:
        """Encode one empty batch, which compiles the network and allocates the memory that the others need.

        Raises:
            WorkerGivesUpError: If that cannot be done here.
        """
        try:
            inputs = self._transfers.to_device(self._rows.blank())
            shown = self._rows.shown(inputs, self._writer.recipe.views[0])
            for target, tokens in zip(
                self._targets, self._stored(list(range(len(self._targets))), shown), strict=True
            ):
                sums = sums_for(target.writer.recipe, self._device)
                if isinstance(sums, DeviceSums):
                    sums.add(tokens.values, range(len(tokens.values)))
                tokens.values.cpu()
        except Exception as error:  # compilers raise what they like
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise WorkerGivesUpError(
                f"{self._name} cannot encode {self._length} images at once{', compiled' * execution.compiled}, as "
                f"{self._writer.path} was begun: {reason}; leave this device out, or begin another store with a "
                f"smaller --batch-size{' or --compile off' * execution.compiled}"
            ) from error

    def run(self) -> None:
        """Take shards and encode them until none is left that this worker can take.

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
        """Encode all shards that can be claimed now."""
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
        """Yield the batches of as many shards as are written at once, in turns."""
        under_way: deque[Iterator[DecodedBatch]] = deque()
        more = True
        while more or under_way:
            while more and len(under_way) < len(self._write_pools):
                self._widen()
                task = self._claims.next()
                more = task is not None
                if task is not None:
                    under_way.append(self._batches_of(task))
            if under_way:
                batch = next(under_way[0], None)
                under_way.rotate(-1)
                if batch is None:
                    under_way.pop()
                else:
                    yield batch

    def _batches_of(self, task: Task) -> Iterator[DecodedBatch]:
        for view in task.views:
            self._lacking[task.shard, view] = [
                index for index, target in enumerate(self._targets) if target.lacks(view, task.shard)
            ]
        # This worker may have stood still since the claim, while others committed some views or all.
        views = tuple(view for view in task.views if self._lacking[task.shard, view])
        if not views:
            self._claims.done(task)
            return
        task = replace(task, views=views)
        used = list(self._pool_of.values())
        self._pool_of[task.shard] = min(range(len(self._write_pools)), key=used.count)
        yield from self._rows.batches(task, self._writer.plan.records_of(task.shard))

    def _encode(self, batch: DecodedBatch) -> None:
        began = time.perf_counter()
        try:
            rows = batch.rows()
            decoded = time.perf_counter()
            inputs = self._transfers.to_device(batch.inputs)
            for view in batch.task.views:
                lacking = self._lacking[batch.task.shard, view]
                buffers = self._free_buffers()
                reasons = ((slot, row.reason_in(view)) for slot, row in enumerate(rows))
                bad = {batch.first_slot + slot: reason for slot, reason in reasons if reason is not None}
                begun = self._transfers.mark()
                stored = self._stored(lacking, self._rows.shown(inputs, view))
                sums = self._add_up(batch, view, lacking, stored, bad)
                done = self._transfers.mark()
                ready = self._transfers.to_host(_copies(lacking, stored, buffers, sums, last=batch.last))
                encoded = _Encoded(batch, view, lacking, buffers, sums, begun, done, ready, bad)
                pool = self._write_pools[self._pool_of[batch.task.shard]][view]
                self._writing.append((batch.task, pool.submit(self._write, encoded)))
            if batch.last:
                del self._pool_of[batch.task.shard]
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
        while self._writing and (len(self._writing) > self._num_buffers or self._writing[0][1].done()):
            self._collect_written()

    def _free_buffers(self) -> list[StoredTokens]:
        """Return buffers that nobody writes from any more; the device waits until there are some."""
        began = time.perf_counter()
        buffers = self._free_tokens.get()
        self._waited += time.perf_counter() - began
        return buffers

    def _stored(self, targets: list[int], shown: Tensor) -> list[StoredTokens]:
        """Return the tokens for each of some targets, in the storage type, on the device."""
        found = outputs(self._encoder, shown, [self._targets[index] for index in targets])
        return [
            self._storage[index](output.tokens, output.class_token)
            for index, output in zip(targets, found, strict=True)
        ]

    def _add_up(
        self,
        batch: DecodedBatch,
        view: str,
        targets: list[int],
        stored: list[StoredTokens],
        bad: Mapping[int, str],
    ) -> list[TorchSums | None]:
        """Return what sums a shard's tokens for each target; on a GPU, the sums of this batch are started there now."""
        sums = []
        good = [slot for slot in range(batch.length) if batch.first_slot + slot not in bad]
        for index, tokens in zip(targets, stored, strict=True):
            key = batch.task.shard, view, index
            if batch.first_slot == 0:
                self._sums[key] = sums_for(self._targets[index].writer.recipe, self._device)
            sums.append(self._sums.pop(key) if batch.last else self._sums[key])
            if isinstance(sums[-1], DeviceSums):
                sums[-1].add(tokens.values, good)
        return sums

    def _collect_written(self) -> None:
        task, future = self._writing.popleft()
        try:
            future.result()
        except SHARD_FAILURES as error:
            raise ShardFailureError(task) from error

    def _write(self, encoded: _Encoded) -> None:
        """Run in the view's writer thread."""
        batch, shards, disk_seconds = encoded.batch, [], 0.0
        with ExitStack() as guard:
            try:
                if encoded.ready is not None:
                    encoded.ready.synchronize()
                began = time.perf_counter()
                for index, sums in zip(encoded.targets, encoded.sums, strict=True):
                    shard = self._opened(batch.task, encoded.view, index, sums)
                    shards.append((index, shard))
                    guard.push(shard)
                    disk_seconds -= shard.disk_seconds
                    self._write_rows(shard, index, encoded)
            finally:
                self._free_tokens.put(encoded.buffers)  # the device goes on while the shard is published
            for index, shard in shards:
                if batch.last:
                    shard.publish()
                disk_seconds += shard.disk_seconds
                if not batch.last:
                    self._open[batch.task.shard, encoded.view, index] = shard
            if not batch.last:
                guard.pop_all()  # the shards stay open for their next batch
        self._count_written(batch)
        self._report(
            BatchWritten(
                self._name,
                batch.task.shard,
                encoded.view,
                write_seconds=time.perf_counter() - began,
                device_seconds=seconds_between(encoded.begun, encoded.done),
                disk_seconds=disk_seconds,
                published=batch.last,
            )
        )

    def _opened(self, task: Task, view: str, index: int, sums: TorchSums | None) -> ShardWriter:
        shard = self._open.pop((task.shard, view, index), None)
        if shard is None:
            target = self._targets[index]
            linked = target.linked(view, task.shard) or self._rows.linked(task, view)
            shard = target.writer.shard(
                view, task.shard, attempts=task.attempt, linked=linked, sums=sums
            ).__enter__()
        return shard

    def _count_written(self, batch: DecodedBatch) -> None:
        """Count one more view of a batch as written; release the batch after its last one."""
        with self._written_lock:
            self._failed_in_a_row.clear()
            batch.views_written += 1
            if batch.views_written < len(batch.task.views):
                return
        self._rows.recycle(batch)
        if batch.last:
            self._claims.done(batch.task)

    def _write_rows(self, shard: ShardWriter, index: int, encoded: _Encoded) -> None:
        batch, tokens = encoded.batch, encoded.buffers[index]
        arrays: dict[str, NDArray[Any]] = {"tokens": tokens.as_numpy()}
        if shard.takes_images and (images := self._rows.images(batch, encoded.view)) is not None:
            arrays["image"] = images
        if tokens.class_token is not None:
            arrays["cls"] = tokens.class_token.numpy()
        good = [slot for slot in range(batch.length) if batch.first_slot + slot not in encoded.bad]
        for run in _consecutive(good):
            block = {name: array[run.start : run.stop] for name, array in arrays.items()}
            shard.write_block(batch.first_slot + run.start, block)
            if tokens.square_error is not None:
                # Row by row, so that the sum does not depend on the batches.
                for square_error in tokens.square_error[run.start : run.stop].numpy():
                    shard.add_square_error(square_error)
        for slot, reason in encoded.bad.items():
            shard.quarantine(slot, reason)

    def _drop_in_flight(self) -> None:
        """Stop all work and remove what was written of unfinished shards."""
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
        self._sums.clear()
        self._pool_of.clear()
        while self._free_tokens.qsize() < self._num_buffers:  # a cancelled write never gave its buffer back
            self._free_tokens.put(self._new_token_buffers())


def _copies(
    targets: list[int],
    stored: list[StoredTokens],
    buffers: list[StoredTokens],
    sums: list[TorchSums | None],
    *,
    last: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return the tensors to copy to the host and their buffers: tokens, and the sums behind a shard's last ones."""
    for index, tokens, total in zip(targets, stored, sums, strict=True):
        yield from tokens.copies_into(buffers[index])
        if last and isinstance(total, DeviceSums):
            yield total.copy_to_host


def _consecutive(slots: list[int]) -> Iterator[range]:
    """Yield the runs of consecutive numbers in an ascending list."""
    begin = 0
    for index in range(1, len(slots) + 1):
        if index == len(slots) or slots[index] != slots[index - 1] + 1:
            yield range(slots[begin], slots[index - 1] + 1)
            begin = index
