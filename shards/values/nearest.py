"""Which interval of its channel each of many values falls into, several times faster than a binary search each.

A channel's values are spread over small equal cells, each of which knows how many boundaries are before it; from
there it is mostly one comparison, sometimes two. Only values far out, where many boundaries share the outermost
cell, need more.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_NUM_CELLS = 1024
# Cells are as wide as the narrow gaps between boundaries, not as the narrowest, which may be arbitrarily small.
_NARROW = 0.1
# float32 may put a value just inside the wrong cell; a cell's count is taken this far before its edge.
_SLACK = 0.01
_CHUNK = 1 << 16  # values worked on at a time: the temporaries stay in the second-level cache


class Intervals:
    """Counts the boundaries of its channel that are below each value.

    Args:
        boundaries: float32[D, K], ascending in each channel; K at most 255.
    """

    def __init__(self, boundaries: NDArray[np.float32]) -> None:
        width, count = boundaries.shape
        infinity = np.full((width, 1), np.inf, np.float32)
        self._boundaries = np.concatenate([boundaries, infinity], axis=1).reshape(-1)
        self._first_boundary = np.arange(width) * (count + 1)
        self._first_cell = np.arange(width) * _NUM_CELLS
        exact = boundaries.astype(np.float64)
        gaps = np.quantile(np.diff(exact, axis=1), _NARROW, axis=1)
        cell = np.maximum(gaps, np.abs(exact).max(axis=1) * 2.0**-20 + 2.0**-100)
        origin = exact[:, count // 2] - cell * (_NUM_CELLS // 2)
        self._origin, self._scale = origin.astype(np.float32), (1.0 / cell).astype(np.float32)
        edges = self._origin.astype(np.float64)[:, None] + cell[:, None] * (np.arange(_NUM_CELLS) - _SLACK)
        counts = np.stack([np.searchsorted(own, at) for own, at in zip(exact, edges, strict=True)])
        counts[:, 0] = 0
        self._counts = counts.astype(np.uint8).reshape(-1)

    def __call__(self, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Boundaries below each value: float32[M, D] → uint8[M, D]; a value on a boundary is not above it."""
        found = np.empty(values.shape, np.uint8)
        step = max(1, _CHUNK // values.shape[1])
        for first in range(0, len(values), step):
            found[first : first + step] = self._chunk(values[first : first + step])
        return found

    def _chunk(self, values: NDArray[np.float32]) -> NDArray[np.int64]:
        with np.errstate(over="ignore"):  # far out is the outermost cell, however far
            cells = (values - self._origin) * self._scale
        cells = np.clip(cells, 0, _NUM_CELLS - 1, out=cells)
        entries = self._counts.take(cells.astype(np.int64) + self._first_cell) + self._first_boundary
        entries += values > self._boundaries.take(entries)
        above = values > self._boundaries.take(entries)
        entries += above
        rest = np.flatnonzero(above)
        flat_values, flat_entries = values.reshape(-1), entries.reshape(-1)
        while len(rest):
            rest = rest[flat_values[rest] > self._boundaries[flat_entries[rest]]]
            flat_entries[rest] += 1
        counts: NDArray[np.int64] = entries - self._first_boundary
        return counts
