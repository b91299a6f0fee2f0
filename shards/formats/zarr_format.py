"""The zarr format: one sharded zarr v3 array a field, one object a shard, one inner chunk a row.

The shards are written here, byte for byte as zarr-python would write them, and read here too: a shard is its rows one
after another, then an index of (offset, nbytes) pairs and the index's CRC32C.

Source: zarr v3 core specification, https://zarr-specs.readthedocs.io/en/latest/v3/core/index.html, and
sharding-indexed codec, https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import StoreDamagedError
from shards.formats.format import EntryCheck, Extents
from shards.metadata.arrays import group_objects, sharded_array_objects
from shards.metadata.compression import field_codec
from shards.metadata.identity import Recipe
from shards.metadata.index import ABSENT
from shards.metadata.layout import Field, fields_of
from shards.metadata.plan import Plan
from shards.storage.checksum import crc32c
from shards.storage.location import Location, begin_object
from shards.storage.object_reader import ObjectReader
from shards.storage.output import Buffer

_NO_CHUNK = np.uint64(2**64 - 1)
_CRC_BYTES = 4


class ZarrFormat:
    """See `shards.formats.format.Format`."""

    shares_objects = False
    has_row_index = True

    def object_path(self, field: Field, shard: int) -> str:
        """See `Format.object_path`: the chunk key of a shard that spans its rows."""
        return "/".join([field.path, "c", str(shard), *("0" for _ in field.row_shape)])

    def documents(self, recipe: Recipe) -> dict[str, bytes]:
        """See `Format.documents`: a group a view, an array a field."""
        documents: dict[str, bytes] = {}
        for view in recipe.views:
            documents |= group_objects(view, {})
            for field in fields_of(recipe, view):
                documents |= sharded_array_objects(field, recipe.capacity, recipe.num_shards)
        return documents

    def open_outputs(
        self,
        root: Location,
        recipe: Recipe,
        plan: Plan,
        view: str,
        shard: int,
        pool: Executor,
        awaited: Collection[str] = (),
    ) -> ZarrOutputs:
        """See `Format.open_outputs`."""
        paths = {field: root / self.object_path(field, shard) for field in fields_of(recipe, view)}
        return ZarrOutputs(paths, recipe, pool, awaited)

    def read_extents(self, source: ObjectReader, field: Field, shard: int, capacity: int) -> Extents:
        """See `Format.read_extents`: the index at the object's end, if it can be true."""
        return _read_extents(source, field, capacity)

    def entry_check(self, fields: Sequence[Field], plan: Plan, shard: int) -> EntryCheck:
        """See `Format.entry_check`: there is nothing but rows and index."""
        return lambda source, slot, rows, start: True


class ZarrOutputs:
    """See `shards.formats.format.ShardOutputs`: an object a field, but for those that are published already."""

    def __init__(
        self, paths: Mapping[Field, Location], recipe: Recipe, pool: Executor, awaited: Collection[str]
    ) -> None:
        self._fields = {
            field.name: ZarrShardFile(path, field, recipe, pool)
            for field, path in paths.items()
            if field.name not in awaited and not path.exists()
        }
        self.all_new = len(self._fields) == len(paths)
        self.files = [file.output for file in self._fields.values()]
        self.offsets: dict[str, NDArray[np.int64]] = {}

    def write(self, first_slot: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """See `ShardOutputs.write`."""
        for name, file in self._fields.items():
            file.write(first_slot, arrays[name])

    def finish(self) -> list[str]:
        """See `ShardOutputs.finish`."""
        return [file.finish() for file in self._fields.values()]


class ZarrShardFile:
    """Writes one shard of one field: rows by ascending slot, then the index."""

    def __init__(self, path: Location, field: Field, recipe: Recipe, pool: Executor) -> None:
        self._codec = field_codec(field)
        self._index = np.full((recipe.capacity, 2), _NO_CHUNK, np.uint64)
        self.output = begin_object(path, pool, recipe.object_digest)

    def write(self, first_slot: int, rows: NDArray[Any]) -> None:
        """Append C-contiguous rows [k, *row_shape] of consecutive slots."""
        if self._codec is None:
            buffers: list[Buffer] = [rows.data]
            sizes = np.full(len(rows), rows[0].nbytes)
        else:
            buffers = [self._codec.encode(row) for row in rows]
            sizes = np.array([len(buffer) for buffer in buffers])
        entries = self._index[first_slot : first_slot + len(rows)]
        entries[:, 0] = self.output.position + np.cumsum(sizes) - sizes
        entries[:, 1] = sizes
        self.output.write(buffers)

    def finish(self) -> str:
        """Append the index, flush and close; returns the digest of the whole object."""
        index = self._index.astype("<u8").tobytes()
        self.output.write([index + crc32c(index).to_bytes(_CRC_BYTES, "little")])
        return self.output.finish()


def _read_extents(source: ObjectReader, field: Field, capacity: int) -> Extents:
    """Read the index at the end of an open shard and check that it can be true.

    Raises:
        StoreDamagedError: Naming the file, if the index fails its checksum or points outside the rows.
    """
    path, size = source.path, source.size
    index_size = capacity * 16 + _CRC_BYTES
    raw = source.read(index_size, max(size - index_size, 0))
    if size < index_size or crc32c(raw[:-_CRC_BYTES]) != int.from_bytes(raw[-_CRC_BYTES:], "little"):
        raise StoreDamagedError(f"{path}: the shard's index fails its checksum; run `pipeline verify`")
    entries = np.frombuffer(raw[:-_CRC_BYTES], "<u8").reshape(capacity, 2)
    absent = (entries == _NO_CHUNK).all(axis=1)
    offsets, sizes = (np.where(absent, np.uint64(0), entries[:, column]) for column in (0, 1))
    end = np.uint64(size - index_size)
    fits = (sizes <= end) & (offsets <= end - np.minimum(sizes, end))  # a sum of the two could wrap
    if field.compression is None:
        fits &= absent | (sizes == field.row_nbytes)
    if not fits.all():
        raise StoreDamagedError(f"{path}: the shard's index points outside its rows; run `pipeline verify`")
    return Extents(np.where(absent, ABSENT, offsets.astype(np.int64)), sizes.astype(np.int64))
