"""The stored tokens of a store as what a derived field is encoded from: read row by row, never the images."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.encode.claims import Task
from pipeline.encode.decoding import DecodedBatch, DecodedRow, RowBatches
from pipeline.encode.tokens import TORCH_TYPES, as_numpy
from shards import CommitRecord, SourceRecord, Store

_ROWS_AT_ONCE = 16
"""Rows a thread reads together: a few megabytes of tokens."""


class StoredBatches(RowBatches):
    """Reads tokens as they are stored, [V, b, N, C]; see `RowBatches` for the other arguments.

    A row is usable in a view exactly if the store has it in that view; else for the same reason not.

    Args:
        store: The store; shards and slots are those of the field that is written.
        images: Whether the field has the store's images, linked.
    """

    def __init__(
        self, store: Store, *, images: bool, length: int, threads: int, pin_memory: bool = False
    ) -> None:
        super().__init__(length=length, threads=threads, pin_memory=pin_memory)
        self._store = store
        self._images = images
        self._commit = lru_cache(maxsize=64)(store.commit)
        self._readers = [store.reader(view, "tokens") for view in store.views]
        self._shape = (store.num_tokens, store.width)

    def linked(self, task: Task, view: str) -> Callable[[], CommitRecord] | None:
        """See `RowBatches.linked`."""
        return partial(self._commit, view, task.shard) if self._images else None

    def shown(self, inputs: Tensor, view: str) -> Tensor:
        """See `RowBatches.shown`: tokens as stored [b, N, C]."""
        return inputs[self._store.views.index(view)]

    def images(self, batch: DecodedBatch, view: str) -> NDArray[Any] | None:
        """See `RowBatches.images`."""
        return None

    def _new(self) -> Tensor:
        shape = (len(self._readers), self._length, *self._shape)
        return torch.zeros(shape, dtype=TORCH_TYPES[self._store.recipe.dtype], pin_memory=self._pin_memory)

    def _start(self, batch: DecodedBatch, records: Sequence[SourceRecord]) -> list[Future[list[DecodedRow]]]:
        bad = {view: self._commit(view, batch.task.shard).bad for view in batch.task.views}
        inputs = as_numpy(batch.inputs)
        return [
            self._pool.submit(
                self._read, batch, bad, inputs, range(first, min(first + _ROWS_AT_ONCE, batch.length))
            )
            for first in range(0, batch.length, _ROWS_AT_ONCE)
        ]

    def _read(
        self, batch: DecodedBatch, bad: dict[str, dict[int, str]], inputs: NDArray[Any], slots: range
    ) -> list[DecodedRow]:
        began = time.perf_counter()
        first = batch.task.shard * self._store.capacity + batch.first_slot
        for view in batch.task.views:
            index = self._store.views.index(view)
            missing = [slot for slot in slots if batch.first_slot + slot in bad[view]]
            present = [slot for slot in slots if slot not in missing]
            inputs[index, missing] = 0
            self._readers[index].read(np.array(present, np.int64) + first, inputs[index], at=present)
        seconds = (time.perf_counter() - began) / len(slots)
        return [DecodedRow(None, seconds, 0.0, self._reasons(bad, batch.first_slot + slot)) for slot in slots]

    @staticmethod
    def _reasons(bad: dict[str, dict[int, str]], slot: int) -> dict[str, str]:
        return {view: reasons[slot] for view, reasons in bad.items() if slot in reasons}
