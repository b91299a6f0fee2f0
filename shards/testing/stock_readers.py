"""A store as strangers see it: through zarr-python and webdataset, which know nothing of this package; for tests."""

from __future__ import annotations

import gc
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.reading.store import Store
from shards.storage.location import object_names, read_objects


def stock_rows(store: Store, view: str, name: str) -> dict[int, NDArray[Any]]:
    """Return every row of a field as the format's usual library sees it, by row; zarr gives fills for absent rows."""
    return STOCK_ROWS[store.recipe.format](store, view, name)


def _zarr_rows(store: Store, view: str, name: str) -> dict[int, NDArray[Any]]:
    import zarr

    array = zarr.open_array(str(store.path / view / name), mode="r")
    return dict(enumerate(np.asarray(array[:])))


def _webdataset_rows(store: Store, view: str, name: str) -> dict[int, NDArray[Any]]:
    return {int(sample["__key__"]): sample[f"{name}.npy"] for sample in stock_samples(store, view)}


STOCK_ROWS: dict[str, Callable[[Store, str, str], dict[int, NDArray[Any]]]] = {
    "zarr": _zarr_rows,
    "webdataset": _webdataset_rows,
}


def stock_samples(store: Store, view: str) -> list[dict[str, Any]]:
    """Return the samples of a view as ``webdataset.WebDataset(...).decode()`` gives them."""
    import webdataset

    tars = [name for name in object_names(store.path, view) if name.endswith(".tar")]
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{number:05d}.tar" for number in range(len(tars))]
        for path, content in zip(paths, read_objects(store.path, tars).values(), strict=True):
            Path(path).write_bytes(content)
        # webdataset leaves its files for the garbage collector to close, which warns of each.
        warnings.simplefilter("ignore", ResourceWarning)
        samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode())
        gc.collect()
    return samples
