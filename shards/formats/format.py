"""The two forms of a store, as far as writing and finding rows differ between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shards.errors import StoreDamagedError
from shards.formats import webdataset_format as tar_store
from shards.formats import zarr_format as zarr_store
from shards.metadata.extents import Extents
from shards.metadata.identity import Recipe
from shards.metadata.layout import Field, fields_of
from shards.metadata.plan import Plan
from shards.storage.location import Location
from shards.storage.object_reader import open_object
from shards.storage.output import OutputFile


class ShardOutputs(Protocol):
    """The objects of one shard of one view while they are being written."""

    @property
    def files(self) -> Sequence[OutputFile]:
        """The objects, in order of field."""

    @property
    def all_new(self) -> bool:
        """Whether none of the objects had been published before; those that had are not written again."""

    @property
    def offsets(self) -> dict[str, NDArray[np.int64]]:
        """First byte of each row by field and place, for forms whose objects have no index of their own."""

    def write(self, first_place: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Append rows of consecutive places: C-contiguous arrays [k, *row_shape] by field."""

    def finish(self) -> list[str]:
        """Complete, flush and close the objects; returns their SHA-256 in the order of `files`."""


class _ZarrOutputs:
    def __init__(self, root: Location, recipe: Recipe, view: str, shard: int, pool: Executor) -> None:
        fields = fields_of(recipe, view)
        self._fields = {
            field.name: zarr_store.ZarrShardFile(root, field, shard, recipe.capacity, pool)
            for field in fields
            if not (root / zarr_store.shard_path(field, shard)).exists()
        }
        self.all_new = len(self._fields) == len(fields)
        self.files = [file.output for file in self._fields.values()]
        self.offsets: dict[str, NDArray[np.int64]] = {}

    def write(self, first_place: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        for name, file in self._fields.items():
            file.write(first_place, arrays[name])

    def finish(self) -> list[str]:
        return [file.finish() for file in self._fields.values()]


def open_outputs(
    root: Location, recipe: Recipe, plan: Plan, view: str, shard: int, pool: Executor
) -> ShardOutputs:
    """Begin the objects of a shard of a view under temporary names."""
    if recipe.format == "zarr":
        return _ZarrOutputs(root, recipe, view, shard, pool)
    return tar_store.TarShardFile(root, fields_of(recipe, view), plan, shard, pool)


def object_path(recipe: Recipe, field: Field, shard: int) -> str:
    """The object that holds a shard of a field."""
    if recipe.format == "zarr":
        return zarr_store.shard_path(field, shard)
    return tar_store.shard_path(field.view, shard)


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
        if recipe.format == "zarr":
            return zarr_store.read_extents(source, field, recipe.capacity)
        return tar_store.scan_extents(source, field, shard, recipe.capacity)
