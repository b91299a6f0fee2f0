"""Groups and arrays of a store as zarr-python makes and reads them, in memory.

What zarr-python writes into its `MemoryStore` is handed out as bytes by name, and `shards.storage` puts them in place:
one way of publishing, in folders and on servers. The rows of shards are not made here, but by `shards.formats`. JSON
documents are spelled with sorted keys, so that equal ones have equal bytes.

zarr-python is imported when the first array is made or read; opening a store needs none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shards.documents import read_document
from shards.errors import StoreDamagedError, UserError
from shards.metadata.compression import zarr_codec
from shards.metadata.layout import ROOT, Field

_MOST_AXES = 4

ReadObject = Callable[[str], bytes]
"""Gives the content of an object of a store by name."""


def group_objects(path: str, attributes: Mapping[str, Any]) -> dict[str, bytes]:
    """Return content by name of a group's one object.

    Args:
        path: Name of the group; empty for the store itself.
        attributes: Plain JSON values.
    """
    import zarr

    contents: dict[str, Any] = {}
    zarr.create_group(_memory(contents), path=path, attributes=dict(attributes))
    return _objects(contents, path)


def array_objects(path: str, values: NDArray[Any], fill: Any) -> dict[str, bytes]:
    """Return content by name of an array that is one uncompressed chunk, little endian.

    Args:
        path: Name of the array.
        values: Its values, of one dimension or more.
        fill: What stands where nothing was written; here that is nowhere.
    """
    import zarr

    contents: dict[str, Any] = {}
    array = zarr.create_array(
        _memory(contents),
        name=path,
        shape=values.shape,
        chunks=values.shape,
        dtype=values.dtype.newbyteorder("<"),
        filters=None,
        compressors=None,
        fill_value=fill,
        config={"write_empty_chunks": True},
    )
    array[...] = values
    return _objects(contents, path)


def sharded_array_objects(field: Field, capacity: int, num_shards: int) -> dict[str, bytes]:
    """Return content by name of the description of a field: ``capacity`` rows a shard, one row an inner chunk."""
    import zarr

    contents: dict[str, Any] = {}
    zarr.create_array(
        _memory(contents),
        name=field.path,
        shape=(capacity * num_shards, *field.row_shape),
        shards=(capacity, *field.row_shape),
        chunks=(1, *field.row_shape),
        dtype=field.dtype.numpy,
        filters=None,
        compressors=None if field.compression is None else zarr_codec(field.compression, field.dtype),
        fill_value=np.nan if field.dtype.fill == "NaN" else field.dtype.fill,
        attributes={"dtype": field.dtype.logical},
    )
    return _objects(contents, field.path)


def read_array(read: ReadObject, path: str) -> NDArray[Any]:
    """Return the values of an array that `array_objects` made, read-only.

    Raises:
        StoreDamagedError: If its objects do not make up an array.
    """
    name = f"{path}/{ROOT}"
    document = read_document(
        read(name), _ArrayDocument, name=name, error=StoreDamagedError, remedy="run `pipeline verify`"
    )
    chunk = f"{path}/c" + "/0" * len(document.shape)
    content = read(chunk)
    dtype = np.dtype(document.data_type)
    nbytes = math.prod(document.shape) * dtype.itemsize
    if len(content) != nbytes:
        raise StoreDamagedError(
            f"{chunk} has {len(content)} bytes, its array {nbytes}; run `pipeline verify`"
        )
    return np.frombuffer(content, dtype.newbyteorder("<")).astype(dtype, copy=False).reshape(document.shape)


@dataclass(frozen=True, kw_only=True)
class _Codec:
    name: str


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """How an array is cut into chunks."""

    configuration: dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class _ArrayDocument:
    """The description of an array that `array_objects` makes, in whatever version's words; other arrays are refused."""

    zarr_format: Literal[3]
    node_type: Literal["array"]
    shape: tuple[int, ...]
    data_type: Literal["bool", "int32", "float32", "float64"]
    chunk_grid: _Grid
    codecs: list[_Codec]

    def __post_init__(self) -> None:
        """Refuse what is not one uncompressed chunk."""
        if not self.shape or len(self.shape) > _MOST_AXES or min(self.shape) < 1:
            raise UserError(f"shape: it is {list(self.shape)[:_MOST_AXES]}")
        if self.chunk_grid.configuration.get("chunk_shape") != self.shape:
            raise UserError("chunk_grid: the array is not a single chunk")
        if [codec.name for codec in self.codecs] != ["bytes"]:
            raise UserError("codecs: the array is compressed")


def read_attributes(read: ReadObject, path: str) -> dict[str, Any]:
    """Return the attributes of a group or array.

    Raises:
        StoreDamagedError: If its document cannot be read.
    """
    name = f"{path}/{ROOT}"
    return read_document(
        read(name), _Attributed, name=name, error=StoreDamagedError, remedy="run `pipeline verify`"
    ).attributes


@dataclass(frozen=True, kw_only=True)
class _Attributed:
    """A group or array with attributes."""

    attributes: dict[str, Any]


def describe_the_same(one: bytes, other: bytes) -> bool:
    """Return whether two ``zarr.json`` documents describe the same group or array, in whatever version's words."""
    return one == other or _described(one) == _described(other)


def _described(document: bytes) -> dict[str, Any] | None:
    import zarr

    try:
        found = zarr.open(_memory({ROOT: _buffer(document)}), mode="r")
        # NaN differs from itself; in JSON it is a word.
        return dict(json.loads(json.dumps(found.metadata.to_dict(), default=str, sort_keys=True)))
    except Exception:  # zarr-python raises what its code meets in a document that is none
        return None


def _memory(contents: dict[str, Any]) -> Any:
    from zarr.storage import MemoryStore

    return MemoryStore(contents)


def _buffer(content: bytes) -> Any:
    from zarr.core.buffer import default_buffer_prototype

    return default_buffer_prototype().buffer.from_bytes(content)


def _objects(contents: Mapping[str, Any], path: str) -> dict[str, bytes]:
    """Return the objects at and below a path; zarr-python makes the groups above it too."""
    inside = f"{path}/" if path else ""
    found = {name: content.to_bytes() for name, content in contents.items() if name.startswith(inside)}
    return {name: _spelled(content) if name.endswith(ROOT) else content for name, content in found.items()}


def _spelled(document: bytes) -> bytes:
    return json.dumps(json.loads(document), indent=2, sort_keys=True).encode()
