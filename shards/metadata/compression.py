"""Compression of single rows by two of zarr's own codecs, for stores kept more than they are read."""

from __future__ import annotations

from collections.abc import Callable
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
_HEADER_NBYTES = 18  # of a zstd frame, the longer of the two


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
    def __init__(self, codec: Any, unpacked_nbytes: Callable[[bytes, int], int]) -> None:
        self._codec = codec
        self._unpacked_nbytes = unpacked_nbytes

    def encode(self, row: NDArray[Any]) -> bytes:
        return bytes(self._codec.encode(row))

    def decode(self, stored: NDArray[np.uint8], out: NDArray[Any]) -> None:
        # The library makes room for whatever the bytes claim, so their claim is compared first.
        claimed = self._unpacked_nbytes(stored[:_HEADER_NBYTES].tobytes(), stored.nbytes)
        if claimed != out.nbytes:
            raise ValueError(f"compressed from {claimed} bytes, a row has {out.nbytes}")
        self._codec.decode(stored, out.reshape(-1).view(np.uint8))


def blosc_nbytes(header: bytes, nbytes: int) -> int:
    """Uncompressed bytes that a blosc buffer of some length claims.

    Source: https://github.com/Blosc/c-blosc/blob/main/README_CHUNK_FORMAT.rst, header.

    Raises:
        ValueError: If it is not as long as it says.
    """
    if len(header) < 16 or int.from_bytes(header[12:16], "little") != nbytes:
        raise ValueError(f"{nbytes} bytes are no blosc buffer")
    return int.from_bytes(header[4:8], "little")


def zstd_nbytes(header: bytes, nbytes: int) -> int:
    """Uncompressed bytes that a zstd frame claims.

    Source: RFC 8878, section 3.1.1.1.

    Raises:
        ValueError: If it is no zstd frame, or does not say.
    """
    if header[:4] != b"\x28\xb5\x2f\xfd" or len(header) < 6:
        raise ValueError(f"{nbytes} bytes are no zstd frame")
    single_segment = header[4] >> 5 & 1
    length = (single_segment, 2, 4, 8)[header[4] >> 6]
    first = 5 + (not single_segment) + (0, 1, 2, 4)[header[4] & 3]
    if not length or len(header) < first + length:
        raise ValueError("a zstd frame that does not say how large it is")
    return int.from_bytes(header[first : first + length], "little") + 256 * (length == 2)


def row_codec(name: str) -> RowCodec:
    """Return the codec a recipe's ``compression`` names."""
    import numcodecs

    if name == "blosc":
        return _Numcodec(numcodecs.Blosc("zstd", _BLOSC_LEVEL, numcodecs.Blosc.BITSHUFFLE), blosc_nbytes)
    assert name == "zstd", name
    return _Numcodec(numcodecs.Zstd(_ZSTD_LEVEL), zstd_nbytes)


def field_codec(field: Field) -> RowCodec | None:
    """Return the codec of a field's rows; None where they are stored as they are."""
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
    """Return the same codec as zarr-python knows it."""
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
