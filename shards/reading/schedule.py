"""What a rank reads as its n-th micro-batch: arithmetic on stream positions, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.draws import choices
from shards.errors import UsageError
from shards.reading.order import Order, share


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one micro-batch.

    Attributes:
        step: Number of the global batch they belong to.
        positions: Stream positions, int64[b].
        rows: Rows, int64[b].
        views: Index of each sample's view, int8[b].
        last_of_step: Whether the rank's share of the global batch ends here.
    """

    step: int
    positions: NDArray[np.int64]
    rows: NDArray[np.int64]
    views: NDArray[np.int8]
    last_of_step: bool


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One rank's micro-batches of the infinite stream.

    Attributes:
        order: The stream of rows.
        seed: Names the draws of views.
        num_views: Views a sample is shown in one of.
        global_batch_size: Samples of a step, over all ranks (B).
        rank: This process's number.
        world_size: Number of processes.
        micro_batch_size: Most samples of a micro-batch; None for the rank's whole share.
        start_sample: Stream position to begin at.
    """

    order: Order
    seed: int
    num_views: int
    global_batch_size: int
    rank: int = 0
    world_size: int = 1
    micro_batch_size: int | None = None
    start_sample: int = 0

    def __post_init__(self) -> None:
        """Refuse what no stream can be cut into."""
        if not 0 <= self.rank < self.world_size:
            raise UsageError(f"rank must be between 0 and {self.world_size - 1}, not {self.rank}")
        if self.global_batch_size < self.world_size:
            raise UsageError(
                f"a global batch of {self.global_batch_size} leaves some of {self.world_size} ranks without a sample"
            )
        if self.start_sample < 0 or self.start_sample % self.global_batch_size:
            raise UsageError(
                f"a stream continues between two global batches, and {self.start_sample} samples seen is not a "
                f"multiple of the global batch size {self.global_batch_size}"
            )
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise UsageError(f"micro-batch size must be 1 or more, not {self.micro_batch_size}")

    @property
    def share(self) -> range:
        """The rank's part of each global batch."""
        return share(self.global_batch_size, self.rank, self.world_size)

    @property
    def largest(self) -> int:
        """Samples of the largest micro-batch."""
        return min(self.micro_batch_size or len(self.share), len(self.share))

    def micro_batch(self, number: int) -> MicroBatch:
        """Return the rank's micro-batch with this number, counted from 0 at ``start_sample``."""
        part = self.share
        per_step = -(-len(part) // self.largest)
        step, piece = divmod(number, per_step)
        first = part.start + piece * self.largest
        size = min(self.largest, part.stop - first)
        position = self.start_sample + step * self.global_batch_size + first
        return MicroBatch(
            step=self.start_sample // self.global_batch_size + step,
            positions=np.arange(position, position + size, dtype=np.int64),
            rows=self.order.rows(position, size),
            views=choices(position, size, self.num_views, seed=self.seed, stream="view"),
            last_of_step=piece == per_step - 1,
        )
