"""The same stream of samples for trainers that bring PyTorch's ``DataLoader`` or Accelerate's ``prepare``.

`SampleDataset` is map-style: its index is a position of the stream, so that whoever asks for a position, in
whatever process, gets the same row and view. `StreamBatchSampler` hands out consecutive positions; Accelerate
gives its batches to the ranks in turn, so that the ranks together read the stream's global batches. Both are
plain objects that ``DataLoader`` takes as they are; see examples/accelerate_loader.py.

An iterable dataset would not do: ``prepare`` lets rank 0 read everything, or every rank read everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.draws import choices
from shards.errors import UsageError
from shards.reading.order import RowOrder
from shards.reading.reader import RowReader, Verify
from shards.reading.shard_file import ReadMode
from shards.reading.store import open_store
from shards.storage.location import Location, as_location


class SampleDataset:
    """Samples of a store by stream position; opens its files in the process that reads them.

    Args:
        path: The store.
        fields: Fields to deliver.
        views: Views to draw from; each position's view is a function of (seed, position).
        seed: Names the order and the draws, as in `shards.reading.loader.Loader`.
        group: How far rows are mixed; see `RowOrder`.
        mode: How bytes are read; see `shards.reading.shard_file`.
        verify: When a row's checksum is compared; see `shards.reading.reader.Verify`.
        follow_links: Read objects that are behind links inside the store.
    """

    def __init__(
        self,
        path: str | Location,
        *,
        fields: Sequence[str] = ("tokens",),
        views: Sequence[str] = ("center", "flip"),
        seed: int,
        group: int | None = None,
        mode: ReadMode = "auto",
        verify: Verify = "first",
        follow_links: bool = False,
    ) -> None:
        self._path = as_location(path)
        self._fields = tuple(fields)
        self._views = tuple(views)
        self._seed = seed
        self._group = group
        self._follow_links = follow_links
        self._mode: ReadMode = mode
        self._verify: Verify = verify
        self._open()

    def _open(self) -> None:
        store = open_store(self._path, follow_links=self._follow_links)
        self._labels = store.labels
        self._order = RowOrder(store.valid_rows, self._seed, self._group, capacity=store.capacity)
        self._readers: dict[str, list[RowReader]] = {
            field: [store.reader(view, field, mode=self._mode, verify=self._verify) for view in self._views]
            for field in self._fields
        }

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle for a worker process: the store's location, and no open files."""
        opened = ("_labels", "_order", "_readers")
        return {name: value for name, value in self.__dict__.items() if name not in opened}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        """Return the number of samples of an epoch; the stream itself has no end."""
        return len(self._order)

    def __getitem__(self, position: int) -> dict[str, NDArray[Any]]:
        """Return the sample at a position: `__getitems__` without the first axis."""
        return {name: array[0] for name, array in self.__getitems__([position]).items()}

    def __getitems__(self, positions: Sequence[int]) -> dict[str, NDArray[Any]]:
        """Return a batch of samples, collated.

        Args:
            positions: Positions of the stream.

        Returns:
            ``position`` and ``row`` int64[b], ``view`` int8[b], ``label`` int64[b], and each field
            [b, *row_shape] as it is stored, in new arrays.
        """
        rows = np.concatenate([self._order.rows(p, 1) for p in positions])
        views = np.concatenate([self._view(p) for p in positions])
        batch: dict[str, NDArray[Any]] = {
            "position": np.asarray(positions, np.int64),
            "row": rows,
            "view": views,
            "label": self._labels[rows].astype(np.int64),
        }
        for field, readers in self._readers.items():
            out = np.empty((len(rows), *readers[0].row_shape), readers[0].dtype)
            for view, reader in enumerate(readers):
                chosen = np.flatnonzero(views == view)
                if len(chosen):
                    reader.read(rows[chosen], out, chosen.tolist())
            batch[field] = out
        return batch

    def _view(self, position: int) -> NDArray[np.int8]:
        return choices(position, 1, len(self._views), seed=self._seed, stream="view")


class StreamBatchSampler:
    """Consecutive positions of the stream in batches of one size; a batch sampler for ``DataLoader``.

    Args:
        batch_size: Samples a process gets at a time.
        num_samples: Samples to hand out; a multiple of ``batch_size``, and over N ranks of N times that.
        start_sample: Position to begin at: samples seen so far, when a run continues.

    Attributes:
        batch_size: As given; Accelerate reads it.
        drop_last: True; Accelerate reads it, and then repeats no sample to fill up a last round.
    """

    def __init__(self, batch_size: int, *, num_samples: int, start_sample: int = 0) -> None:
        if batch_size < 1 or num_samples < 0 or num_samples % batch_size:
            raise UsageError(f"{num_samples} samples cannot be handed out in batches of {batch_size}")
        if start_sample < 0:
            raise UsageError(f"a stream begins at position 0, not {start_sample}")
        self.batch_size = batch_size
        self.drop_last = True
        self._num_samples = num_samples
        self._start_sample = start_sample

    def __len__(self) -> int:
        """Return the number of batches."""
        return self._num_samples // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the positions of each batch."""
        first = self._start_sample
        for start in range(first, first + self._num_samples, self.batch_size):
            yield list(range(start, start + self.batch_size))
