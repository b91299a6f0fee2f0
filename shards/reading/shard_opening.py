"""From a shard's number to its open file: where the object lies, and where its rows lie in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.formats.format import object_path
from shards.formats.zarr_format import read_extents
from shards.metadata.extents import ABSENT, Extents
from shards.metadata.identity import Recipe
from shards.metadata.layout import Field
from shards.reading.shard_file import ReadMode, ShardFile
from shards.storage.object_reader import ObjectReader


class RowLocator:
    """Finds the rows of one field in a shard's object; the form decides where their places come from.

    Args:
        recipe: The store's recipe.
        field: The field.
        offsets: First byte of each row in its object, int64[num_rows], for forms whose objects have no index.
    """

    def __init__(self, recipe: Recipe, field: Field, offsets: NDArray[np.int64] | None) -> None:
        self.recipe = recipe
        self.field = field
        self._offsets = offsets

    def __call__(self, source: ObjectReader, shard: int) -> Extents:
        """Where the rows lie in an open object.

        Raises:
            StoreDamagedError: If its own index is damaged.
        """
        capacity = self.recipe.capacity
        if self._offsets is None:
            return read_extents(source, self.field, capacity)
        offsets = self._offsets[shard * capacity : (shard + 1) * capacity]
        return Extents(offsets, np.where(offsets == ABSENT, 0, self.field.row_nbytes))


class ShardOpener:
    """Opens a field's shards that lie on this machine."""

    def __init__(self, root: Path, locator: RowLocator, mode: ReadMode) -> None:
        self._root = root
        self._locator = locator
        self._mode = mode

    def __call__(self, shard: int) -> ShardFile:
        """Open one shard.

        Raises:
            StoreDamagedError: If its own index is damaged.
        """
        path = self._root / object_path(self._locator.recipe, self._locator.field, shard)
        return ShardFile(path, lambda source: self._locator(source, shard), self._mode)
