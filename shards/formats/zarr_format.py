"""The zarr form: one sharded zarr v3 array a field, one object a shard, one inner chunk a row.

The metadata and the shards are written here, byte for byte as zarr-python would write them, and read here
too: a shard is its rows one after another, then an index of (offset, nbytes) pairs and the index's CRC32C.

Source: zarr v3 core specification, https://zarr-specs.readthedocs.io/en/latest/v3/core/index.html, and
sharding-indexed codec, https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html.
"""

from __future__ import annotations

from concurrent.futures import Executor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import StoreDamagedError
from shards.metadata.compression import field_codec
from shards.metadata.extents import ABSENT, Extents
from shards.metadata.layout import Field
from shards.storage.checksum import crc32c
from shards.storage.location import Location
from shards.storage.object_reader import ObjectReader
from shards.storage.output import Buffer, OutputFile

_NO_CHUNK = np.uint64(2**64 - 1)
_CRC_BYTES = 4


def shard_path(field: Field, shard: int) -> str:
    """Object that holds a shard of a field."""
    return "/".join([field.path, "c", str(shard), *("0" for _ in field.row_shape)])


class ZarrShardFile:
    """Writes one shard of one field: rows by ascending place, then the index."""

    def __init__(self, root: Location, field: Field, shard: int, capacity: int, pool: Executor) -> None:
        self._codec = field_codec(field)
        self._index = np.full((capacity, 2), _NO_CHUNK, np.uint64)
        self.output = OutputFile(root / shard_path(field, shard), pool)

    def write(self, first_place: int, rows: NDArray[Any]) -> None:
        """Append C-contiguous rows [k, *row_shape] of consecutive places."""
        if self._codec is None:
            buffers: list[Buffer] = [rows.data]
            sizes = np.full(len(rows), rows[0].nbytes)
        else:
            buffers = [self._codec.encode(row) for row in rows]
            sizes = np.array([len(buffer) for buffer in buffers])
        entries = self._index[first_place : first_place + len(rows)]
        entries[:, 0] = self.output.position + np.cumsum(sizes) - sizes
        entries[:, 1] = sizes
        self.output.write(buffers)

    def finish(self) -> str:
        """Append the index, flush and close; returns the SHA-256 of the whole object."""
        index = self._index.astype("<u8").tobytes()
        self.output.write([index + crc32c(index).to_bytes(_CRC_BYTES, "little")])
        return self.output.finish()


def read_extents(source: ObjectReader, field: Field, capacity: int) -> Extents:
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
    offsets = np.where(absent, np.uint64(0), entries[:, 0]).astype(np.int64)
    sizes = np.where(absent, np.uint64(0), entries[:, 1]).astype(np.int64)
    fits = (offsets >= 0) & (sizes >= 0) & (offsets + sizes <= size - index_size)
    if field.compression is None:
        fits &= absent | (sizes == field.row_nbytes)
    if not fits.all():
        raise StoreDamagedError(f"{path}: the shard's index points outside its rows; run `pipeline verify`")
    return Extents(np.where(absent, ABSENT, offsets), sizes)
