"""Mean and variance of a store's tokens, as small arrays [D, h, w]: the exact ones of each view, and given ones.

A store may be given statistics that a file holds: its readers then normalise by these. It keeps its exact ones too.
``stats/from-file`` is published at the begin of an encode, before the exact ones can be known; its ``zarr.json`` comes
first, so that of two files given at once one wins as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.errors import StoreDamagedError, UsageError
from shards.metadata.arrays import ReadObject, array_objects, group_objects, read_array, read_attributes
from shards.metadata.layout import MANIFEST
from shards.storage.location import Location, publish_bytes, read_object
from shards.values.moments import Moments

_GIVEN = "stats/from-file"
GIVEN = f"{_GIVEN}/zarr.json"
"""Names the file the statistics came from; there are given statistics where it exists."""
_ARRAYS = ("mean", "variance")


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


COLLAPSED = 1e-3
"""A number of a latent whose variance is below this share of the median one's has collapsed; ours."""


def collapsed_share(variance: NDArray[np.float64]) -> float:
    """Return the share of the numbers of a latent that hardly vary over the images.

    Args:
        variance: Variance of each number over the images, in any shape.
    """
    return float((variance < COLLAPSED * np.median(variance)).mean())


@dataclass(frozen=True)
class GivenStatistics:
    """Mean and variance that somebody published.

    Attributes:
        statistics: Mean and variance, float64[D, h, w]; zeros for a mean the file does not have, and no count.
        name: The file's name, without its folder.
        sha256: Of the file.
    """

    statistics: Statistics
    name: str
    sha256: str


def statistics_objects(view: str, moments: Moments, grid: tuple[int, int]) -> dict[str, bytes]:
    """Return content by path of a view's statistics; token moments [N, D] become maps [D, h, w]."""
    objects = group_objects(f"stats/{view}", {"count": moments.count})
    for name, tokens in zip(_ARRAYS, (moments.mean, moments.variance), strict=True):
        maps = np.ascontiguousarray(tokens.T).reshape(-1, *grid)
        objects |= array_objects(f"stats/{view}/{name}", maps, np.nan)
    return objects


def error_objects(view: str, error: NDArray[np.float64]) -> dict[str, bytes]:
    """Return content by path of the error that a view's int8 code makes, ``stats/view/error``, float64[D]."""
    return array_objects(f"stats/{view}/error", error, np.nan)


def read_error(read: ReadObject, view: str) -> NDArray[np.float64]:
    """Read what `error_objects` wrote, float64[D]."""
    return read_array(read, f"stats/{view}/error")


def merged_statistics(read: ReadObject, views: Iterable[str], shape: tuple[int, int, int]) -> Statistics:
    """Return the statistics of several views together.

    Args:
        read: Gives the content of an object of the store.
        views: Views to merge, in this order.
        shape: (D, h, w).

    Raises:
        StoreDamagedError: If they are not arrays of this shape.
    """
    merged = Moments.empty(shape)
    for view in views:
        count = read_attributes(read, f"stats/{view}").get("count")
        if type(count) is not int or not 0 <= count < 1 << 53:
            raise StoreDamagedError(f"stats/{view} has no count of rows; run `pipeline verify`")
        mean, variance = _read_pair(read, f"stats/{view}", shape)
        merged = merged.merge(Moments(count, mean, variance * count))
    return Statistics(merged.mean, merged.variance, merged.count)


def read_token_moments(read: ReadObject, view: str, row_shape: tuple[int, ...]) -> Moments:
    """Read what `statistics_objects` wrote for a view, as moments of its tokens [N, D]."""
    num_tokens, width = row_shape
    count = int(read_attributes(read, f"stats/{view}")["count"])
    maps = (read_array(read, f"stats/{view}/{name}") for name in _ARRAYS)
    mean, variance = (np.ascontiguousarray(m.reshape(width, num_tokens).T) for m in maps)
    return Moments(count, mean, variance * count)


def publish_given(root: Location, given: GivenStatistics | None) -> None:
    """Make a store's readers normalise by given statistics; the first to be published stay.

    Args:
        root: A store that has been begun.
        given: Statistics of tokens of its shape; the caller has checked that. None leaves the store as it is.

    Raises:
        UsageError: If the store has others, or was finished without any.
    """
    if given is None:
        return
    if (root / MANIFEST).exists() and not (root / GIVEN).exists():
        raise UsageError(
            f"{root} was finished with the statistics of its own tokens; train with --statistics {given.name}, "
            "or encode into a new folder with --stats-from"
        )
    objects = group_objects(_GIVEN, {"name": given.name, "sha256": given.sha256})
    publish_bytes(root / GIVEN, objects[GIVEN])
    name, sha256 = _source(lambda path: read_object(root / path))
    if sha256 != given.sha256:
        raise UsageError(
            f"{root} was begun with the statistics of {name} (SHA-256 {sha256[:16]}…), not of {given.name} "
            f"({given.sha256[:16]}…); give that file, leave out --stats-from, or encode into a new folder"
        )
    for path, content in _given_arrays(given.statistics).items():
        publish_bytes(root / path, content)


def given_source(root: Location) -> dict[str, str] | None:
    """Return the name and digest of the file a store's given statistics come from; None if it has its own alone."""
    if not (root / GIVEN).exists():
        return None
    name, sha256 = _source(lambda path: read_object(root / path))
    return {"name": name, "sha256": sha256}


def given_objects(root: Location) -> list[str]:
    """Return the paths of everything under ``stats/from-file``; empty if the store has its own statistics alone.

    Raises:
        StoreDamagedError: If whoever gave them was stopped halfway.
    """
    if not (root / GIVEN).exists():
        return []
    nothing = np.zeros((1, 1, 1))
    paths = [GIVEN, *_given_arrays(Statistics(nothing, nothing, 0))]
    missing = [path for path in paths if not (root / path).exists()]
    if missing:
        name, _ = _source(lambda path: read_object(root / path))
        raise StoreDamagedError(f"{root / missing[0]} is missing; run again with --stats-from {name}")
    return paths


def read_given(read: ReadObject, shape: tuple[int, int, int]) -> GivenStatistics:
    """Return the given statistics of a store that has some.

    Args:
        read: Gives the content of an object of the store.
        shape: (D, h, w).

    Raises:
        StoreDamagedError: If they are not arrays of this shape.
    """
    name, sha256 = _source(read)
    mean, variance = _read_pair(read, _GIVEN, shape)
    return GivenStatistics(Statistics(mean, variance, count=0), name, sha256)


def _given_arrays(statistics: Statistics) -> dict[str, bytes]:
    objects: dict[str, bytes] = {}
    for name, values in zip(_ARRAYS, (statistics.mean, statistics.variance), strict=True):
        objects |= array_objects(f"{_GIVEN}/{name}", values, np.nan)
    return objects


def _read_pair(
    read: ReadObject, path: str, shape: tuple[int, int, int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    mean, variance = (read_array(read, f"{path}/{name}") for name in _ARRAYS)
    for values in (mean, variance):
        if values.shape != shape or values.dtype != np.float64:
            raise StoreDamagedError(
                f"{path} holds {values.dtype} {values.shape} in place of float64 {shape}; run `pipeline verify`"
            )
    return mean, variance


def _source(read: ReadObject) -> tuple[str, str]:
    """Return the name and digest of the file, from `GIVEN`."""
    attributes = read_attributes(read, _GIVEN)
    name, sha256 = attributes.get("name"), attributes.get("sha256")
    if not isinstance(name, str) or not isinstance(sha256, str):
        raise StoreDamagedError(f"{GIVEN} does not name its file and digest; run `pipeline verify`")
    return name, sha256
