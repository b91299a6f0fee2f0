"""A store's tokens in the device's memory, for rows so small that feeding them costs more than computing with them.

The order, the views and every draw are those of the loader, which then delivers rows and labels alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards import Batch, Store, UsageError, storage_type
from train.models.dequantize import stored_tensor

_ROWS_AT_ONCE = 1024
_AUTOMATIC_SHARE = 0.5
"""Share of the memory that is free beside network and optimizer that tokens take without being asked to."""
_ASKED_SHARE = 0.9
"""Share they may take if asked to; activations need the rest."""


class ResidentTokens:
    """Tokens of some rows in some views, as they are stored, on one device."""

    def __init__(
        self, store: Store, views: Sequence[str], rows: NDArray[np.int64], device: torch.device
    ) -> None:
        """Read them, each row once with its checksum.

        Args:
            store: the store.
            views: views in the loader's order.
            rows: rows that will be asked for, ascending, int64 [n].
            device: where they are held.
        """
        self._device, self._num_rows = device, len(rows)
        self._place = np.full(store.num_rows, -1, np.int64)
        self._place[rows] = np.arange(len(rows))
        self._values: Tensor | None = None
        for index, view in enumerate(views):
            reader = store.reader(view, "tokens")
            for first in range(0, len(rows), _ROWS_AT_ONCE):
                part = rows[first : first + _ROWS_AT_ONCE]
                held = np.empty((len(part), *reader.row_shape), reader.dtype)
                reader.read(part, held)
                tokens = stored_tensor(held, reader.logical_dtype)
                if self._values is None:
                    shape = (len(views) * len(rows), *reader.row_shape)
                    self._values = torch.empty(shape, dtype=tokens.dtype, device=device)
                start = index * len(rows) + first
                self._values[start : start + len(part)] = tokens.to(device)

    def gather(self, batch: Batch) -> Tensor:
        """Return tokens [b, N, D] as stored of a batch's rows, each in its view, in memory of their own."""
        assert self._values is not None
        places = self._place[batch.rows] + batch.views.astype(np.int64) * self._num_rows
        return self._values.index_select(0, torch.from_numpy(places).to(self._device, non_blocking=True))


def tokens_nbytes(store: Store, num_views: int, num_rows: int) -> int:
    """Return how many bytes the tokens of some rows take in some views."""
    values = store.num_tokens * store.width
    return num_views * num_rows * values * storage_type(store.recipe.dtype).numpy.itemsize


def hold_tokens(
    store: Store,
    views: Sequence[str],
    rows: NDArray[np.int64],
    device: torch.device,
    *,
    asked: bool | None,
    network_nbytes: int,
) -> ResidentTokens | None:
    """Return the tokens of a run in the device's memory, or None where they are read as they are needed.

    Args:
        store: the store.
        views: views that samples are taken from.
        rows: rows that are trained on.
        device: the process's device.
        asked: whether to hold them; None: on CUDA, where they leave room.
        network_nbytes: bytes that network, gradients, moments and averages will take.

    Raises:
        UsageError: they are asked for and do not fit.
    """
    if asked is False or (asked is None and device.type != "cuda"):
        return None
    needed = tokens_nbytes(store, len(views), len(rows))
    room = free_nbytes(device) - network_nbytes
    if asked and needed > _ASKED_SHARE * room:
        raise UsageError(
            f"--resident holds {needed / 1e9:,.2f} GB of tokens in the memory of {device}, where "
            f"{max(room, 0) / 1e9:,.2f} GB are free beside the network; leave it out, or train on compact latents, "
            "fewer views or fewer rows"
        )
    if asked or needed <= _AUTOMATIC_SHARE * room:
        return ResidentTokens(store, views, rows, device)
    return None


def free_nbytes(device: torch.device) -> int:
    """Return how many bytes are free in a device's memory; for a CPU, in the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
