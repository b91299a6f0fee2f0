"""Statistics that a file gave instead of the tokens: readers of the store normalise by them.

A store keeps its exact statistics too. ``stats/from-file`` is published at the begin of an encode, before the
exact ones can be known; its ``zarr.json`` comes first, so that of two files given at once one wins as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from shards.errors import StoreDamagedError, UsageError
from shards.metadata.layout import MANIFEST
from shards.metadata.statistics_arrays import Statistics
from shards.metadata.zarr_documents import group_document, plain_array_document
from shards.storage.location import Location, publish_bytes

GIVEN = "stats/from-file/zarr.json"
"""Names the file the statistics came from; there are given statistics where it exists."""
_CHUNKS = {name: f"stats/from-file/{name}/c/0/0/0" for name in ("mean", "variance")}
_DOCUMENTS = {name: f"stats/from-file/{name}/zarr.json" for name in _CHUNKS}


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
    publish_bytes(root / GIVEN, group_document({"name": given.name, "sha256": given.sha256}))
    name, sha256 = _source((root / GIVEN).read_bytes())
    if sha256 != given.sha256:
        raise UsageError(
            f"{root} was begun with the statistics of {name} (SHA-256 {sha256[:16]}…), not of {given.name} "
            f"({given.sha256[:16]}…); give that file, leave out --stats-from, or encode into a new folder"
        )
    for part, values in (("mean", given.statistics.mean), ("variance", given.statistics.variance)):
        publish_bytes(
            root / _DOCUMENTS[part], plain_array_document(values.shape, np.dtype(np.float64), "NaN")
        )
        publish_bytes(root / _CHUNKS[part], values.astype("<f8").tobytes())


def given_source(root: Location) -> dict[str, str] | None:
    """Name and digest of the file a store's given statistics come from; None if it has its own alone."""
    if not (root / GIVEN).exists():
        return None
    name, sha256 = _source((root / GIVEN).read_bytes())
    return {"name": name, "sha256": sha256}


def given_objects(root: Location) -> list[str]:
    """Paths of everything under ``stats/from-file``; empty if the store has its own statistics alone.

    Raises:
        StoreDamagedError: If whoever gave them was stopped halfway.
    """
    if not (root / GIVEN).exists():
        return []
    paths = [GIVEN, *_DOCUMENTS.values(), *_CHUNKS.values()]
    missing = [path for path in paths if not (root / path).exists()]
    if missing:
        name, _ = _source((root / GIVEN).read_bytes())
        raise StoreDamagedError(f"{root / missing[0]} is missing; run again with --stats-from {name}")
    return paths


def read_given(read: Callable[[str], bytes], shape: tuple[int, int, int]) -> GivenStatistics:
    """The given statistics of a store that has some.

    Args:
        read: Gives the content of an object of the store.
        shape: (D, h, w).

    Raises:
        StoreDamagedError: If they are not arrays of this shape.
    """
    name, sha256 = _source(read(GIVEN))
    try:
        mean, variance = (np.frombuffer(read(path), "<f8").reshape(shape) for path in _CHUNKS.values())
    except ValueError as error:
        raise StoreDamagedError(
            f"stats/from-file is not readable ({error}); run `pipeline verify`"
        ) from error
    return GivenStatistics(Statistics(mean, variance, count=0), name, sha256)


def _source(document: bytes) -> tuple[str, str]:
    """Name and digest of the file, from `GIVEN`."""
    try:
        attributes = json.loads(document)["attributes"]
        return str(attributes["name"]), str(attributes["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise StoreDamagedError(f"{GIVEN} is not readable ({error!r}); run `pipeline verify`") from error
