"""The ``zarr.json`` documents of a store's group and arrays, byte for byte as zarr-python would write them.

Source: zarr v3 core specification, https://zarr-specs.readthedocs.io/en/latest/v3/core/index.html, and
sharding-indexed codec, https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from shards.metadata.compression import zarr_codec
from shards.metadata.layout import Field


def group_document(attributes: dict[str, Any]) -> bytes:
    """``zarr.json`` of a group."""
    return _document({"attributes": attributes, "zarr_format": 3, "node_type": "group"})


def plain_array_document(shape: tuple[int, ...], dtype: np.dtype[Any], fill: Any) -> bytes:
    """``zarr.json`` of an array that is one uncompressed chunk."""
    return _array_document(shape, shape, dtype.name, fill, [_bytes_codec(dtype)], {})


def sharded_array_document(field: Field, capacity: int, num_shards: int) -> bytes:
    """``zarr.json`` of a field: one shard of ``capacity`` rows an object, one row an inner chunk."""
    inner = [_bytes_codec(field.dtype.numpy)]
    if field.compression is not None:
        inner.append(zarr_codec(field.compression, field.dtype))
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [1, *field.row_shape],
            "codecs": inner,
            "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            "index_location": "end",
        },
    }
    return _array_document(
        (capacity * num_shards, *field.row_shape),
        (capacity, *field.row_shape),
        field.dtype.numpy.name,
        field.dtype.fill,
        [sharding],
        {"dtype": field.dtype.logical},
    )


def _bytes_codec(dtype: np.dtype[Any]) -> dict[str, Any]:
    return (
        {"name": "bytes"} if dtype.itemsize == 1 else {"name": "bytes", "configuration": {"endian": "little"}}
    )


def _array_document(
    shape: tuple[int, ...],
    chunk_shape: tuple[int, ...],
    data_type: str,
    fill: Any,
    codecs: list[dict[str, Any]],
    attributes: dict[str, Any],
) -> bytes:
    return _document(
        {
            "shape": list(shape),
            "data_type": data_type,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk_shape)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": fill,
            "codecs": codecs,
            "attributes": attributes,
            "zarr_format": 3,
            "node_type": "array",
            "storage_transformers": [],
        }
    )


def _document(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=2, sort_keys=True).encode()
