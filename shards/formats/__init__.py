"""The storage formats: one protocol (`shards.formats.format`), a module a format, and which one a recipe names."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shards.errors import StoreDamagedError
from shards.formats.format import Extents, Format
from shards.formats.webdataset_format import WebdatasetFormat
from shards.formats.zarr_format import ZarrFormat
from shards.metadata.code_table import code_documents
from shards.metadata.identity import Recipe
from shards.metadata.index import ABSENT
from shards.metadata.layout import Field
from shards.storage.location import Location, open_object
from shards.storage.object_reader import ObjectReader

_LARGEST_OFFSET = 1 << 62
"""An offset to which a row's length can be added without wrapping."""
FORMATS: dict[str, Format] = {"zarr": ZarrFormat(), "webdataset": WebdatasetFormat()}


def format_of(recipe: Recipe) -> Format:
    """Return the format that a recipe names."""
    return FORMATS[recipe.format]


def object_path(recipe: Recipe, field: Field, shard: int) -> str:
    """Return the name inside the store of the object that holds a shard of a field."""
    return format_of(recipe).object_path(field, shard)


def array_documents(recipe: Recipe) -> dict[str, bytes]:
    """Return content by path of every small object that follows from a store's recipe, its root document apart."""
    documents = format_of(recipe).documents(recipe)
    if recipe.dtype == "int8":
        documents |= code_documents(recipe.encoder.width)
    return documents


def grown_documents(recipe: Recipe) -> dict[str, bytes]:
    """Return content by path of those documents that an extension changes; none of a store that was not extended.

    They describe whole arrays for zarr readers in general, so they are replaced where they are, and no manifest lists
    them: their content follows from the recipe, and readers of this package do not need them.
    """
    if not recipe.earlier:
        return {}
    before = array_documents(recipe.at_stage(0))
    return {name: content for name, content in array_documents(recipe).items() if before[name] != content}


def scan_extents(root: Location, recipe: Recipe, field: Field, shard: int) -> Extents:
    """Find the rows of a field in a shard by looking into the object itself.

    Raises:
        StoreDamagedError: If the object is missing or its structure is damaged.
    """
    path = root / object_path(recipe, field, shard)
    try:
        source = open_object(path)
    except FileNotFoundError as error:
        raise StoreDamagedError(f"{path}: shard {shard} is missing; run `pipeline verify`") from error
    with source:
        return format_of(recipe).read_extents(source, field, shard, recipe.capacity)


class RowLocator:
    """Finds the rows of one field in a shard's object.

    Args:
        recipe: The store's recipe.
        field: The field.
        offsets: First byte of each row in its object, int64[num_rows], as ``index.parquet`` has it; None for formats
            with a row index, which is then read from the object.
    """

    def __init__(self, recipe: Recipe, field: Field, offsets: NDArray[np.int64] | None) -> None:
        self.recipe = recipe
        self.field = field
        self._offsets = offsets

    def __call__(self, source: ObjectReader, shard: int) -> Extents:
        """Where the rows are in an open object.

        Raises:
            StoreDamagedError: If its own index is damaged.
        """
        capacity = self.recipe.capacity
        if self._offsets is None:
            return format_of(self.recipe).read_extents(source, self.field, shard, capacity)
        offsets = self._offsets[shard * capacity : (shard + 1) * capacity]
        if len(offsets) and not ABSENT <= offsets.min() <= offsets.max() < _LARGEST_OFFSET:
            raise StoreDamagedError(
                f"{source.path}: the index places rows of shard {shard} where no file reaches"
            )
        return Extents(offsets, np.where(offsets == ABSENT, 0, self.field.row_nbytes))
