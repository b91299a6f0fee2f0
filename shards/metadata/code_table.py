"""The int8 code inside a store: one small zarr array ``code/table``, and the error it was measured to make.

Codes become numbers with nothing but zarr and numpy: ``table[np.arange(D), codes + 128]``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shards.errors import StoreDamagedError
from shards.metadata.arrays import ReadObject, array_objects, group_objects, read_array
from shards.metadata.identity import Recipe
from shards.metadata.layout import CODE_TABLE
from shards.storage.location import Location, read_object
from shards.values.moments import Moments
from shards.values.quantize import NUM_LEVELS, Int8Code


def code_objects(code: Int8Code) -> dict[str, bytes]:
    """Return content by path of everything under ``code/``."""
    return _objects(code.table)


def code_documents(width: int) -> dict[str, bytes]:
    """Return content by path of the ``zarr.json`` files under ``code/``, which follow from the number of channels."""
    objects = _objects(np.zeros((width, NUM_LEVELS + 1), np.float32))
    return {path: content for path, content in objects.items() if path != CODE_TABLE}


def _objects(table: NDArray[np.float32]) -> dict[str, bytes]:
    meaning = {"meaning": "entry code + 128 of a channel's row is the number an int8 code stands for"}
    return group_objects("code", meaning) | array_objects("code/table", table, np.nan)


def read_code(read: ReadObject, recipe: Recipe) -> Int8Code:
    """Return the code of a store of int8 tokens.

    Args:
        read: Gives the content of an object of the store.
        recipe: The store's recipe, which names the code's digest.

    Raises:
        StoreDamagedError: If there is no such table, or it is not the recipe's.
    """
    table = read_array(read, "code/table")
    expected = (recipe.encoder.width, NUM_LEVELS + 1)
    if table.shape != expected or table.dtype != np.float32:
        raise StoreDamagedError(
            f"{CODE_TABLE} is not an int8 code: float32 {expected} expected, got {table.shape}"
        )
    try:
        code = Int8Code(table)
    except ValueError as error:
        raise StoreDamagedError(f"{CODE_TABLE} is not an int8 code: {error}") from error
    if recipe.code is not None and code.digest != recipe.code:
        raise StoreDamagedError(f"{CODE_TABLE} is not the code the store was written with")
    return code


def published_code(root: Location, recipe: Recipe) -> Int8Code | None:
    """Return the code of a store that is being written; None if its tokens are not int8.

    Raises:
        StoreDamagedError: If it is missing or not the recipe's.
    """
    if recipe.dtype != "int8":
        return None
    try:
        return read_code(lambda path: read_object(root / path), recipe)
    except FileNotFoundError as error:
        raise StoreDamagedError(
            f"{root / CODE_TABLE} is missing; int8 tokens mean nothing without it"
        ) from error


def relative_error(square_error: NDArray[np.float64], moments: Moments) -> NDArray[np.float64]:
    """Return RMS error of each channel as a share of its own standard deviation, over all tokens.

    Args:
        square_error: Sum over rows and tokens of squared errors, float64[D].
        moments: Of the same rows' tokens, [N, D]; their standard deviation is over rows and tokens together.

    Returns:
        float64[D]; infinite for a channel that should vary and does not, NaN where the error is not known.
    """
    pooled = Moments.empty(square_error.shape)
    for mean, m2 in zip(moments.mean, moments.m2, strict=True):
        pooled = pooled.merge(Moments(moments.count, mean, m2))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(square_error == 0, 0.0, np.sqrt(square_error / pooled.m2))
