"""Exact, mergeable mean and variance of the tokens, per token and channel.

A shard's moments are sums over its rows in order of slot, so that their bits depend on the stored numbers
only, not on how many workers wrote them in what batches. Shards are merged in order of shard.

Source: Chan, Golub, LeVeque, "Algorithms for computing the sample variance", The American Statistician 37
(1983): shifted sums within a shard, the pairwise update between shards.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from shards.errors import StoreDamagedError
from shards.values.dtypes import (
    HALF_SCALE,
    StorageType,
    half_is_finite,
    half_to_scaled_float32,
    storage_type,
    to_float64,
)
from shards.values.quantize import Int8Code

# Columns worked on at a time: a tile of float64 stays in the second-level cache.
_TILE = 16384


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of some rows.

    Attributes:
        count: Rows.
        mean: float64[*row_shape]; zeros where there are no rows.
        m2: Sum over rows of squared deviations from the mean, float64[*row_shape].
    """

    count: int
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]

    @classmethod
    def empty(cls, row_shape: tuple[int, ...]) -> Self:
        """Return the moments of no rows."""
        return cls(0, np.zeros(row_shape), np.zeros(row_shape))

    @property
    def variance(self) -> NDArray[np.float64]:
        """Population variance, float64[*row_shape]."""
        return self.m2 / max(self.count, 1)

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets of rows together."""
        if not self.count or not other.count:
            return other if not self.count else self
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta * delta * (self.count * (other.count / count))
        return Moments(count, mean, m2)

    def to_bytes(self) -> bytes:
        """Convert to an npy file: float64 of the count, then the means, then the m2."""
        buffer = io.BytesIO()
        vector = np.concatenate([[float(self.count)], self.mean.ravel(), self.m2.ravel()])
        np.save(buffer, vector, allow_pickle=False)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes, row_shape: tuple[int, ...]) -> Self:
        """Read back what `to_bytes` gave.

        Raises:
            StoreDamagedError: If it is not such a file.
        """
        size = 1 + 2 * math.prod(row_shape)
        header = _npy_header(size)
        if not content.startswith(header) or len(content) != len(header) + 8 * size:
            raise StoreDamagedError(f"partial sums cannot be read: they are not those of rows of {row_shape}")
        vector = np.frombuffer(content, np.float64, offset=len(header))
        if not 0 <= vector[0] < 1 << 53:
            raise StoreDamagedError(f"partial sums cannot be read: they count {vector[0]} rows")
        mean, m2 = vector[1:].reshape(2, *row_shape)
        return cls(int(vector[0]), mean, m2)


def _npy_header(size: int) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f8", "fortran_order": False, "shape": (size,)})
    return buffer.getvalue()


def moments_of_sums(
    count: int, total: NDArray[np.float64], squares: NDArray[np.float64], row_shape: tuple[int, ...]
) -> Moments:
    """Return the moments of rows whose sums are known.

    Args:
        count: Rows.
        total: Their sum, float64[n].
        squares: The sum of their squares, float64[n].
        row_shape: Shape of a row, of n numbers.
    """
    if not count:
        return Moments.empty(row_shape)
    mean = total / count
    m2 = np.maximum(squares - total * mean, 0.0)
    return Moments(count, mean.reshape(row_shape), m2.reshape(row_shape))


class TokenSums(Protocol):
    """Adds up the tokens of one shard; whoever does it, by whatever means, the bits are those of `RowSums`."""

    def update(self, rows: NDArray[Any], /) -> None:
        """Take note of rows [k, *row_shape] of the storage type, which are being written, in order of slot."""

    @property
    def finite(self) -> bool:
        """Whether no row held NaN or infinity."""

    @property
    def has_nan(self) -> bool:
        """Whether a row of float16 held NaN, which no wider type repairs."""

    def moments(self) -> Moments:
        """Return the moments of the rows, which must be `finite`."""


class RowSums:
    """Adds up rows one after another into `Moments`.

    Args:
        row_shape: Shape of a row.
        dtype: How its numbers are stored.
        code: What int8 numbers encode.
    """

    def __init__(self, row_shape: tuple[int, ...], dtype: StorageType, code: Int8Code | None = None) -> None:
        self._row_shape = row_shape
        self._code = code
        self._dtype = dtype if code is None else storage_type("float32")
        self._half = self._dtype.logical == "float16"
        size = int(np.prod(row_shape))
        self._count = 0
        self._shift = np.zeros(size)
        self._sum = np.zeros(size)
        self._squares = np.zeros(size)

    def update(self, rows: NDArray[Any]) -> None:
        """Add rows [k, *row_shape] of the storage type, in order of slot."""
        if not len(rows):
            return
        flat: NDArray[Any] = (rows if self._code is None else self._code.decode(rows)).reshape(len(rows), -1)
        if self._half and not half_is_finite(flat):
            self._squares[:] = np.nan if np.isnan(flat).any() else np.inf
        if not self._count and not self._half:
            # Deviations from any one row keep a large common mean from drowning a small variance. Half precision
            # cannot tell deviations that small from none, so it goes without.
            self._shift = to_float64(flat[0], self._dtype)
        for start in range(0, flat.shape[1], _TILE):
            tile = slice(start, start + _TILE)
            self._add(flat[:, tile], self._shift[tile], self._sum[tile], self._squares[tile])
        self._count += len(rows)

    def _add(
        self,
        rows: NDArray[Any],
        shift: NDArray[np.float64],
        total: NDArray[np.float64],
        squares: NDArray[np.float64],
    ) -> None:
        # Row by row: a sum over the axis would round differently for every batch size.
        with np.errstate(invalid="ignore"):  # infinities are for `finite` to find
            for row in rows:
                if self._half:
                    deviations = half_to_scaled_float32(row).astype(np.float64)
                else:
                    deviations = to_float64(row, self._dtype)
                    deviations -= shift
                total += deviations
                deviations *= deviations
                squares += deviations

    @property
    def finite(self) -> bool:
        """Whether no row held NaN or infinity."""
        return all(bool(np.isfinite(part).all()) for part in (self._shift, self._sum, self._squares))

    @property
    def has_nan(self) -> bool:
        """See `TokenSums.has_nan`."""
        return bool(np.isnan(self._squares).any())

    def moments(self) -> Moments:
        """Return the moments of the rows added so far, which must be `finite`."""
        found = moments_of_sums(self._count, self._sum, self._squares, self._row_shape)
        if self._half:
            return Moments(found.count, found.mean * HALF_SCALE, found.m2 * HALF_SCALE**2)
        return Moments(found.count, found.mean + self._shift.reshape(self._row_shape), found.m2)
