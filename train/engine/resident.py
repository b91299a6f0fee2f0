"""A store's tokens in the device's memory, for rows so small that feeding them costs more than computing with them.

The order, the views and every draw are those of the loader, which then delivers rows and labels alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards import Batch, Store, UsageError, storage_type
from train.distributed import Team
from train.models.dequantize import stored_tensor

_ROWS_AT_ONCE = 1024
AUTOMATIC_SHARE = {"cuda": 0.5, "cpu": 0.25}
"""Share of the memory that is free beside network and optimizer that tokens take without being asked to.

A machine's memory has other users than the run, among them the cache of the files that the tokens are read from.
"""
ASKED_SHARE = 0.9
"""Share they may take if asked to; activations need the rest."""
_CGROUP = Path("/sys/fs/cgroup")


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

    @property
    def nbytes(self) -> int:
        """Memory that they take."""
        return 0 if self._values is None else self._values.nbytes

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
    team: Team,
    *,
    asked: bool | None,
    network_nbytes: int,
    num_samples: int,
) -> ResidentTokens | None:
    """Return the tokens of a run in the memory of each process's device; None where they are read as needed.

    All processes of a run decide alike.

    Args:
        store: the store.
        views: views that samples are taken from.
        rows: rows that are trained on.
        team: the processes.
        asked: whether to hold them; None: where they fit.
        network_nbytes: bytes that network, gradients, moments and averages will take.
        num_samples: samples that the run has still to take.

    Raises:
        UsageError: they are asked for and do not fit.
    """
    if asked is False:
        return None
    device = team.device
    # Processes that compute on processors share the memory of their machine.
    sharers = 1 if device.type == "cuda" else team.local_world_size
    room = min(team.gather(free_nbytes(device) // sharers - network_nbytes))
    held = is_resident(
        tokens_nbytes(store, len(views), len(rows)),
        room,
        asked=asked,
        device=device,
        read_once=num_samples >= len(views) * len(rows),
    )
    return ResidentTokens(store, views, rows, device) if held else None


def is_resident(
    needed: int, room: int, *, asked: bool | None, device: torch.device, read_once: bool = True
) -> bool:
    """Return whether tokens are held in a device's memory.

    Args:
        needed: bytes of the tokens.
        room: bytes that are free in the memory beside the network.
        asked: whether to hold them; None: if they fit easily and the run takes each of them at least once.
        device: the device.
        read_once: whether the run takes as many samples as are held.

    Raises:
        UsageError: they are asked for and do not fit.
    """
    if asked is None:
        return read_once and needed <= AUTOMATIC_SHARE[device.type] * room
    if asked and needed > ASKED_SHARE * room:
        raise UsageError(
            f"--resident holds {needed / 1e9:,.2f} GB of tokens in the memory of {device}, and may take "
            f"{ASKED_SHARE:.0%} of the {max(room, 0) / 1e9:,.2f} GB that are free beside the network; leave it out, or "
            "train on compact latents, fewer views or fewer rows"
        )
    return asked


def free_nbytes(device: torch.device) -> int:
    """Return how many bytes are free in a device's memory; of a CPU, those that machine and cgroup can still give."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(int(psutil.virtual_memory().available), _cgroup_nbytes())


def _cgroup_nbytes() -> int:
    """Return how many bytes are left of the cgroup's memory limit (version 2); without one, more than there can be."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        current = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return sys.maxsize
    # Cached files are given back when memory is wanted.
    return sys.maxsize if limit == "max" else int(limit) - current + int(stat.get("inactive_file", 0))
