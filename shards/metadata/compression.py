"""Compression of single rows by two of zarr's own codecs, for stores kept more than they are read."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shards.metadata.layout import Field
from shards.values.dtypes import StorageType

# Level 1 with bitshuffle was the smallest that still decodes faster than a disk delivers; higher levels
# gained less than 3 % on float16 tokens for a third of the speed (measured on tokens of a randomly weighted
# ViT). Photographs are compared in docs/encoding.md.
_BLOSC_LEVEL = 1
_ZSTD_LEVEL = 1


class RowCodec(Protocol):
    """Turns a row's bytes into fewer bytes and back."""

    def encode(self, row: NDArray[Any]) -> bytes:
        """Compress one C-contiguous row."""

    def decode(self, stored: NDArray[np.uint8], out: NDArray[Any]) -> None:
        """Decompress one row into ``out``, which is C-contiguous.

        Raises:
            RuntimeError: If the bytes are not a compressed row.
            ValueError: If they decompress to another length.
        """


class _Numcodec:
    def __init__(self, codec: Any) -> None:
        self._codec = codec

    def encode(self, row: NDArray[Any]) -> bytes:
        return bytes(self._codec.encode(row))

    def decode(self, stored: NDArray[np.uint8], out: NDArray[Any]) -> None:
        decoded = np.frombuffer(self._codec.decode(stored), np.uint8)
        if decoded.nbytes != out.nbytes:
            raise ValueError(f"decompressed to {decoded.nbytes} bytes, a row has {out.nbytes}")
        out.reshape(-1).view(np.uint8)[:] = decoded


def row_codec(name: str) -> RowCodec:
    """The codec a recipe's ``compression`` names."""
    import numcodecs

    if name == "blosc":
        return _Numcodec(numcodecs.Blosc("zstd", _BLOSC_LEVEL, numcodecs.Blosc.BITSHUFFLE))
    assert name == "zstd", name
    return _Numcodec(numcodecs.Zstd(_ZSTD_LEVEL))


def field_codec(field: Field) -> RowCodec | None:
    """The codec of a field's rows; None where they are stored as they are."""
    return None if field.compression is None else row_codec(field.compression)


def unpack_row(field: Field, stored: NDArray[np.uint8], out: NDArray[Any]) -> None:
    """Turn a row's stored bytes into its numbers.

    Raises:
        RuntimeError: If the bytes are not a compressed row.
        ValueError: If they are of another length than the row.
    """
    codec = field_codec(field)
    if codec is not None:
        codec.decode(stored, out)
    elif stored.nbytes != out.nbytes:
        raise ValueError(f"{stored.nbytes} bytes, a row has {out.nbytes}")
    else:
        out.reshape(-1).view(np.uint8)[:] = stored


def zarr_codec(name: str, dtype: StorageType) -> Any:
    """The same codec as zarr-python knows it."""
    from zarr.codecs import BloscCodec, ZstdCodec

    if name == "blosc":
        return BloscCodec(
            typesize=dtype.numpy.itemsize,
            cname="zstd",
            clevel=_BLOSC_LEVEL,
            shuffle="bitshuffle",
            blocksize=0,
        )
    assert name == "zstd", name
    return ZstdCodec(level=_ZSTD_LEVEL, checksum=False)
