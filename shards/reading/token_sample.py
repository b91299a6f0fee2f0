"""Some tokens of some images, enough of them to fit an int8 code and to measure what a storage type loses."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shards.reading.store import Store

# Values a channel that are kept, of which the fit takes half: from 128 or more images they settle the worst trained
# channel's error to 0.01 points (benchmarks/quantisation.py), and float32 [65536, 768] is 200 MB.
_NUM_VALUES = 1 << 16


def sample_stored(store: Store, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Read some tokens of some rows of a finished store in every view, float32 [rows, values, D].

    Args:
        store: The store.
        rows: Numbers of valid rows, int64 [rows].
    """
    parts = []
    for index, view in enumerate(store.views):
        chosen = chosen_tokens(store.num_tokens, len(rows), index, len(store.views))
        reader = store.reader(view, "tokens")
        row = np.empty((1, *reader.row_shape), reader.dtype)
        kept = np.empty((len(rows), len(chosen), store.width), np.float32)
        for index_of_row, number in enumerate(rows.tolist()):
            reader.read([number], row)
            kept[index_of_row] = store.decode(row[:, chosen])[0]
        parts.append(kept)
    return np.concatenate(parts, axis=1)


def chosen_tokens(num_tokens: int, num_images: int, view: int, num_views: int) -> NDArray[np.int64]:
    """Return the numbers of evenly spread tokens of an image in one of its views, int64 [share].

    So many that all images in all views together give 65,536 values a channel. Views show much the same image, so
    each gives other tokens.
    """
    share = min(num_tokens, max(1, _NUM_VALUES // (num_images * num_views)))
    first = view * num_tokens // (share * num_views)
    return (np.arange(share) * num_tokens // share + first) % num_tokens
