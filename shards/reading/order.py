"""Which row is read when: a pure function of the valid rows, a seed and the position in the stream.

The stream is infinite: the orders of epoch 0, 1, 2... one after another. An epoch is every valid row exactly
once. Global batch s of size B is the stream's positions [sB, (s + 1)B), so that no row is dropped or padded
at the end of an epoch, and no rank, thread or batch size has a say in what comes next. To resume is to start
at another position.
"""

from __future__ import annotations

import threading
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shards.draws import permutation, shuffled_within
from shards.errors import UsageError


class Order(Protocol):
    """An infinite stream of rows."""

    def rows(self, start: int, count: int) -> NDArray[np.int64]:
        """Return rows at the stream's positions [start, start + count), int64[count]."""


class RowOrder:
    """The infinite stream of rows.

    Args:
        valid_rows: Rows of an epoch, ascending, int64[n].
        seed: Names the order.
        group: How far rows are mixed. None: over the whole store. k ≥ 1: within groups of k shards, which are
            chosen again each epoch and read one group after another. 0: not at all, rows come as they are
            stored.
        capacity: Rows of a shard; needed for a group.
    """

    def __init__(
        self,
        valid_rows: NDArray[np.int64],
        seed: int,
        group: int | None = None,
        *,
        capacity: int | None = None,
    ) -> None:
        if not len(valid_rows):
            raise UsageError("a store without a valid row cannot be read in any order")
        if group is not None and group < 0:
            raise UsageError(f"group must be 0 (as stored), a number of shards, or none (all), not {group}")
        if group and not capacity:
            raise ValueError("a group of shards needs the capacity of a shard")
        self._rows = valid_rows
        self._seed = seed
        self._group = group
        self._capacity = capacity
        self._epochs: dict[int, NDArray[np.int64]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Rows of an epoch."""
        return len(self._rows)

    def rows(self, start: int, count: int) -> NDArray[np.int64]:
        """Return rows at the stream's positions [start, start + count), int64[count]."""
        parts = []
        while count > 0:
            epoch, first = divmod(start, len(self._rows))
            part = self.epoch(epoch)[first : first + count]
            parts.append(part)
            start += len(part)
            count -= len(part)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """Return the order of one epoch, int64[n]; not to be written to."""
        with self._lock:
            order = self._epochs.get(epoch)
            if order is None:
                order = self._rows[self._permutation(epoch)]
                order.setflags(write=False)
                # A batch may straddle two epochs; older ones will not be asked for again.
                self._epochs = {e: o for e, o in self._epochs.items() if e == epoch - 1} | {epoch: order}
        return order

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        size = len(self._rows)
        if self._group == 0:
            return np.arange(size, dtype=np.int64)
        if self._group is None:
            return permutation(size, seed=self._seed, stream="order", epoch=epoch)
        assert self._capacity is not None
        shards = self._rows // self._capacity
        num_shards = int(shards[-1]) + 1
        rank = np.empty(num_shards, np.int64)
        rank[permutation(num_shards, seed=self._seed, stream="order/shards", epoch=epoch)] = np.arange(
            num_shards
        )
        groups = (rank // self._group)[shards].astype(np.uint64)
        return shuffled_within(groups, seed=self._seed, stream="order", epoch=epoch)


def share(batch_size: int, rank: int, world_size: int) -> range:
    """Return the part of a global batch that a rank takes: contiguous, sizes differing by at most one."""
    base, larger = divmod(batch_size, world_size)
    first = rank * base + min(rank, larger)
    return range(first, first + base + (rank < larger))


def shuffle_quality(order: NDArray[np.int64], capacity: int, window: int = 256) -> float:
    """Return how many different shards meet in a batch, compared with a full shuffle: 1 is as good as one.

    The mean number of different shards in windows of ``window`` successive rows, divided by the number to be
    expected if each row came from a shard drawn at random.

    Args:
        order: The rows of an epoch, int64[n].
        capacity: Rows of a shard.
        window: Rows looked at together.
    """
    shards = order // capacity
    window = min(window, len(shards))
    windows = shards[: len(shards) // window * window].reshape(-1, window)
    ordered = np.sort(windows, axis=1)
    different = 1 + (np.diff(ordered, axis=1) != 0).sum(axis=1)
    num_shards = len(np.unique(shards))
    expected = num_shards * (1 - (1 - 1 / num_shards) ** window)
    return float(different.mean() / expected)
