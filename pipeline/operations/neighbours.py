"""`pipeline neighbours`: a page of the rows that are nearest to one row, by the stored representation."""

import html
import sys

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.operations.page import img, png, read_rows, table, write_page
from pipeline.operations.row_features import row_features, unit_length
from pipeline.settings.operations import NeighboursConfig
from shards import Store, UsageError, beside, even_spread, open_store

_TILE = 160
_TILES_ACROSS = 6


def neighbours(config: NeighboursConfig) -> None:
    """Write a page of the nearest rows.

    Raises:
        UserError: If the row is not valid, or the store holds too few.
    """
    store = open_store(config.store, follow_links=config.follow_links)
    valid = store.valid_rows
    if config.row not in valid:
        raise UsageError(
            f"--row must be a valid row of {store.path}, from {valid[0] if len(valid) else 'none'} to "
            f"{valid[-1] if len(valid) else 'none'}, got {config.row}"
        )
    if config.count < 1 or config.rows < 1:
        raise UsageError(f"--count and --rows must be at least 1, got {config.count} and {config.rows}")
    candidates = valid[even_spread(config.rows, len(valid))]
    candidates = candidates[candidates != config.row]
    if not len(candidates):
        raise UsageError(f"{store.path} has no rows beside {config.row} to compare it with")
    rows, similarity = nearest(store, config.row, candidates, config.count, config.features, config.view)
    out = config.out or beside(store.path, f"{store.path.name}-row-{config.row}.html")
    write_page(
        out, f"Nearest to row {config.row} of {store.path.name}", _sections(store, config, rows, similarity)
    )
    sys.stdout.write(f"{out}\n")


def nearest(
    store: Store,
    row: int,
    candidates: NDArray[np.int64],
    count: int,
    features: str = "pooled",
    view: str | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the rows most similar to one row, nearest first.

    Args:
        store: The store.
        row: The row.
        candidates: Other rows, ascending.
        count: How many of them, at most.
        features: See `row_features`.
        view: Likewise.

    Returns:
        Row numbers int64 [k] and cosine similarities float32 [k].
    """
    found = unit_length(row_features(store, candidates, features, view))
    own = unit_length(row_features(store, np.array([row], np.int64), features, view))[0]
    similarity = found @ own
    order = np.argsort(-similarity, kind="stable")[:count]
    return candidates[order], similarity[order]


def _sections(
    store: Store, config: NeighboursConfig, rows: NDArray[np.int64], similarity: NDArray[np.float32]
) -> list[str]:
    what = "tokens averaged over positions" if config.features == "pooled" else "class tokens"
    compared = min(config.rows, len(store.valid_rows))
    note = (
        f"Cosine similarity of {what}, view {config.view or store.views[0]}, {compared:,} of "
        f"{len(store.valid_rows):,} rows; {store.recipe.encoder.name}."
    )
    every = np.concatenate([[config.row], rows])
    parts = [f"<p>{html.escape(note)}</p>"]
    if store.image_size:
        parts.append(_images(store, every))
    keys = dict(zip(store.plan.rows.tolist(), store.plan.keys, strict=True))
    values = ["–", *(f"{value:.4f}" for value in similarity.tolist())]
    lines = [
        (row, value, _class_of(store, row), keys[row])
        for row, value in zip(every.tolist(), values, strict=True)
    ]
    return [*parts, table([("row", "similarity", "class", "key"), *lines])]


def _class_of(store: Store, row: int) -> str:
    label = int(store.labels[row])
    return store.class_name(label) if label >= 0 else "–"


def _images(store: Store, rows: NDArray[np.int64]) -> str:
    """Return the tiles of rows, the row itself first; the table below is in the same order."""
    view = next(view for view in store.views if "image" in store.recipe.fields(view))
    order = np.argsort(rows)
    images = np.empty((len(rows), store.image_size, store.image_size, 3), np.uint8)
    images[order] = read_rows(store, view, "image", rows[order])
    tiles = [np.asarray(Image.fromarray(image).resize((_TILE, _TILE))) for image in images]
    tiles = [np.pad(tile, ((0, 8), (0, 8), (0, 0)), constant_values=255) for tile in tiles]
    blank = np.full_like(tiles[0], 255)
    tiles += [blank] * (-len(tiles) % _TILES_ACROSS)
    bands = [np.hstack(tiles[start : start + _TILES_ACROSS]) for start in range(0, len(tiles), _TILES_ACROSS)]
    return img(png(Image.fromarray(np.vstack(bands))), "the row, then the nearest ones in order")
