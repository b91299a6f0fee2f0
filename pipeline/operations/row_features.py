"""One vector a row: its tokens averaged over positions, or its class token."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from shards import Store, UsageError, usable_cores

_ROWS_AT_ONCE = 32


def row_features(
    store: Store, rows: NDArray[np.int64], features: str, view: str | None = None
) -> NDArray[np.float32]:
    """Return a vector of each of some valid rows.

    Args:
        store: The store.
        rows: Row numbers, ascending: so read, neighbours lie together.
        features: `pooled`, the mean of the tokens over positions, or `cls`, the class token.
        view: None takes the first.

    Returns:
        float32 [len(rows), D].

    Raises:
        UsageError: If the store has no class tokens, or no such view.
    """
    view = view or store.views[0]
    if features == "cls" and not store.recipe.class_token:
        raise UsageError(
            f"{store.path} holds no class tokens; use --features pooled, or encode with --class-token"
        )
    found = np.empty((len(rows), store.width), np.float32)
    reader = store.reader(view, "tokens" if features == "pooled" else "cls")

    def fill(first: int) -> None:
        part = rows[first : first + _ROWS_AT_ONCE]
        stored = np.empty((len(part), *reader.row_shape), reader.dtype)
        reader.read(part, stored)
        if features == "pooled":
            found[first : first + len(part)] = store.decode(stored).mean(axis=1, dtype=np.float32)
        else:
            found[first : first + len(part)] = stored

    with ThreadPoolExecutor(usable_cores()) as pool:
        list(pool.map(fill, range(0, len(rows), _ROWS_AT_ONCE)))
    return found


def unit_length(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return vectors [n, D] divided by their lengths; zero ones stay zero."""
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    scaled: NDArray[np.float32] = features / np.maximum(lengths, np.finfo(np.float32).tiny)
    return scaled
