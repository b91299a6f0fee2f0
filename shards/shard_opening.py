"""From a shard's number to its open file: where the object lies, and where its rows lie in it."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.extents import ABSENT, Extents
from shards.forms import object_path
from shards.identity import Recipe
from shards.layout import Field
from shards.shard_file import ReadMode, ShardFile
from shards.zarr_store import read_extents


class ShardOpener:
    """Opens shards of one field; the form decides where the rows' places come from."""

    def __init__(
        self, root: Path, recipe: Recipe, field: Field, mode: ReadMode, offsets: NDArray[np.int64] | None
    ) -> None:
        self._root = root
        self._recipe = recipe
        self._field = field
        self._mode = mode
        self._offsets = offsets

    def __call__(self, shard: int) -> ShardFile:
        """Open one shard.

        Raises:
            StoreDamagedError: If its own index is damaged.
        """
        path = self._root / object_path(self._recipe, self._field, shard)
        return ShardFile(path, lambda descriptor: self._locate(descriptor, path, shard), self._mode)

    def _locate(self, descriptor: int, path: Path, shard: int) -> Extents:
        capacity = self._recipe.capacity
        if self._offsets is None:
            compressed = self._recipe.compression is not None
            return read_extents(descriptor, path, self._field, capacity, compressed=compressed)
        offsets = self._offsets[shard * capacity : (shard + 1) * capacity]
        return Extents(offsets, np.where(offsets == ABSENT, 0, self._field.row_nbytes))


def max_open_files() -> int:
    """Shards a reader keeps open: a share of the process's limit, since there are several readers."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, (1024 if soft == resource.RLIM_INFINITY else soft) // 16)
