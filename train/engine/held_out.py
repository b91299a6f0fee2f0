"""Rows that training leaves out, to see whether what it learns holds for images it has never seen."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shards import UsageError, permutation


def split_rows(
    valid_rows: NDArray[np.int64], held_out: int, *, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return rows to train on and rows to leave out, each ascending; a function of the arguments alone.

    Args:
        valid_rows: rows of the store, ascending, int64 [n].
        held_out: rows to leave out.
        seed: names the draw.

    Raises:
        UsageError: nothing would be left to train on.
    """
    if held_out >= len(valid_rows):
        raise UsageError(
            f"--held-out {held_out} leaves nothing to train on: the store has {len(valid_rows)} images"
        )
    left_out = np.zeros(len(valid_rows), bool)
    left_out[permutation(len(valid_rows), seed=seed, stream="held out")[:held_out]] = True
    return valid_rows[~left_out], valid_rows[left_out]
