"""The exact statistics of a finished store, as small zarr arrays of shape [D, h, w] a view."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.errors import StoreDamagedError
from shards.metadata.zarr_documents import group_document, plain_array_document
from shards.values.moments import Moments


@dataclass(frozen=True)
class Statistics:
    """Mean and variance of the tokens of some views.

    Attributes:
        mean: float64[D, h, w].
        variance: Population variance, float64[D, h, w].
        count: Rows they were computed from; 0 if a file gave them.
    """

    mean: NDArray[np.float64]
    variance: NDArray[np.float64]
    count: int


def statistics_objects(view: str, moments: Moments, grid: tuple[int, int]) -> dict[str, bytes]:
    """Content by path of a view's statistics; token moments [N, D] become maps [D, h, w]."""
    files = {f"stats/{view}/zarr.json": group_document({"count": moments.count})}
    for name, tokens in (("mean", moments.mean), ("variance", moments.variance)):
        maps = np.ascontiguousarray(tokens.T).reshape(-1, *grid)
        files[f"stats/{view}/{name}/zarr.json"] = plain_array_document(maps.shape, maps.dtype, "NaN")
        files[f"stats/{view}/{name}/c/0/0/0"] = maps.astype("<f8").tobytes()
    return files


def error_objects(view: str, error: NDArray[np.float64]) -> dict[str, bytes]:
    """Content by path of the error that a view's int8 code makes, ``stats/view/error``, float64[D]."""
    return {
        f"stats/{view}/error/zarr.json": plain_array_document(error.shape, error.dtype, "NaN"),
        error_path(view): error.astype("<f8").tobytes(),
    }


def error_path(view: str) -> str:
    """Where the one chunk of a view's error lies."""
    return f"stats/{view}/error/c/0"


def merged_statistics(
    read: Callable[[str], bytes], views: Iterable[str], shape: tuple[int, int, int]
) -> Statistics:
    """Statistics of several views together.

    Args:
        read: Gives the content of an object of the store.
        views: Views to merge, in this order.
        shape: (D, h, w).
    """
    merged = Moments.empty(shape)
    for view in views:
        try:
            count = int(json.loads(read(f"stats/{view}/zarr.json"))["attributes"]["count"])
            mean, variance = (
                np.frombuffer(read(f"stats/{view}/{name}/c/0/0/0"), "<f8").reshape(shape)
                for name in ("mean", "variance")
            )
        except (ValueError, KeyError, TypeError) as error:
            raise StoreDamagedError(
                f"stats/{view} is not readable ({error}); run `pipeline verify`"
            ) from error
        merged = merged.merge(Moments(count, mean, variance * count))
    return Statistics(merged.mean, merged.variance, merged.count)
