"""How numbers are in a store: storage types, what they mean, and what stands where no row was written.

numpy, zarr and npy know no bfloat16, so its bits are stored as ``uint16``. The fill of each type is a value
that no written row consists of, so that an absent row can never pass for data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class StorageType:
    """One way of storing numbers.

    Attributes:
        logical: What the values are.
        numpy: Type in which numpy, zarr and npy see the bytes (little endian).
        fill: zarr v3 ``fill_value`` as it is written in JSON.
    """

    logical: str
    numpy: np.dtype[Any]
    fill: int | str


# 0x7FC0 is the quiet NaN of bfloat16: float32's 0x7FC00000 without its lower half.
_TYPES = {
    "float16": StorageType("float16", np.dtype("<f2"), "NaN"),
    "bfloat16": StorageType("bfloat16", np.dtype("<u2"), 0x7FC0),
    "float32": StorageType("float32", np.dtype("<f4"), "NaN"),
    "int8": StorageType("int8", np.dtype("i1"), -128),
    "uint8": StorageType("uint8", np.dtype("u1"), 0),
}
TOKEN_DTYPES = ("float16", "bfloat16", "float32", "int8")
"""Storage types tokens may have; int8 codes stay within ±127 and are read with ``code/``."""


def storage_type(logical: str) -> StorageType:
    """Return the storage type with this name."""
    return _TYPES[logical]


def float32_to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round float32 to bfloat16 (nearest, ties to even) and return its bits; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def bfloat16_to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Widen bfloat16 bits to float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


HALF_SCALE = 2.0**112
"""Factor by which `half_to_scaled_float32` is too small: two to the difference of the biases, 127 - 15."""


def half_is_finite(values: NDArray[np.float16]) -> bool:
    """Return whether no float16 is NaN or infinity; numpy's ``isfinite`` takes ten times as long for them."""
    return int((values.view(np.uint16) & np.uint16(0x7FFF)).max(initial=0)) < 0x7C00


def half_to_scaled_float32(values: NDArray[np.float16]) -> NDArray[np.float32]:
    """Finite float16 divided by `HALF_SCALE`, as float32: exact, and many times as fast as ``astype``.

    float16's exponent and mantissa are moved to where float32 has its own, which leaves the difference of the
    exponents' biases as a factor, for denormal numbers too.
    """
    bits = values.view(np.int16).astype(np.int32)
    bits <<= 13
    bits &= np.int32(-0x70000001)  # the sign, which the widening spread over three bits, goes back to one
    return bits.view(np.float32)


def to_storage(values: NDArray[np.float32], dtype: StorageType) -> NDArray[Any]:
    """Round float32 tokens to a floating storage type.

    Raises:
        ValueError: If ``dtype`` is not a floating one.
    """
    if dtype.logical == "bfloat16":
        return float32_to_bfloat16(values)
    if dtype.numpy.kind != "f":
        raise ValueError(f"{dtype.logical} is a code, not a floating type")
    return values.astype(dtype.numpy)


def to_float64(stored: NDArray[Any], dtype: StorageType) -> NDArray[np.float64]:
    """Return the numbers a reader gets back from a floating storage type, exactly, as float64."""
    if dtype.logical == "bfloat16":
        return bfloat16_to_float32(stored).astype(np.float64)
    return stored.astype(np.float64)
