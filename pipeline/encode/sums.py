"""Exact sums of float16 tokens by torch: the bits of `shards`' own, on the processor or where the tokens were made.

Products of two float16 are exact in float64, so a fused multiply-add rounds as two operations do; rows are added one
after another as `shards.values.moments.RowSums` adds them. `tests/pipeline/test_sums.py` compares the bits.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards import Moments, Recipe, moments_of_sums

_TILE = 24576
"""Columns worked on at a time on a processor: three tiles of float64 stay in the second-level cache."""


class TorchSums:
    """Sums of the rows of one shard; see `shards.values.moments.TokenSums`.

    Args:
        row_shape: Shape of a row.
        device: Where the sums are kept.
    """

    def __init__(self, row_shape: tuple[int, ...], device: torch.device) -> None:
        self._row_shape = row_shape
        self._device = device
        size = int(np.prod(row_shape))
        self._count = 0
        self._sums = torch.zeros((2, size), dtype=torch.float64, device=device)

    @torch.inference_mode()
    def add(self, rows: Tensor, slots: Sequence[int]) -> None:
        """Add some of the rows float16 [k, *row_shape], which lie on the sums' device, one after another."""
        flat = rows.reshape(len(rows), -1)
        tile = _TILE if self._device.type == "cpu" else flat.shape[1]
        for start in range(0, flat.shape[1], tile):
            total, squares = self._sums[:, start : start + tile]
            columns = flat[:, start : start + tile]
            for slot in slots:
                values = columns[slot].double()
                total.add_(values)
                squares.addcmul_(values, values)
        self._count += len(slots)

    def update(self, rows: NDArray[Any]) -> None:
        """Add rows float16 [k, *row_shape] in order of place."""
        self.add(torch.from_numpy(rows), range(len(rows)))

    @property
    def finite(self) -> bool:
        """Whether no row held NaN or infinity."""
        return bool(torch.isfinite(self._sums).all())

    @property
    def has_nan(self) -> bool:
        """Whether a row held NaN; squares of infinity do not add up to it."""
        return bool(torch.isnan(self._sums[1]).any())

    def moments(self) -> Moments:
        """Moments of the rows added so far, which must be `finite`."""
        total, squares = self._sums.cpu().numpy()
        return moments_of_sums(self._count, total, squares, self._row_shape)


class DeviceSums(TorchSums):
    """Sums that `add` makes where the encoder put the tokens; the rows that are written are only counted.

    They are copied to the host with the shard's last rows, so that whoever publishes the shard need not wait for what
    the device was asked to do since.
    """

    def __init__(self, row_shape: tuple[int, ...], device: torch.device) -> None:
        super().__init__(row_shape, device)
        self._written = 0
        self._host = torch.empty(self._sums.shape, dtype=torch.float64, pin_memory=device.type == "cuda")

    @property
    def copy_to_host(self) -> tuple[Tensor, Tensor]:
        """The sums, and where on the host they are looked for."""
        return self._sums, self._host

    def update(self, rows: NDArray[Any]) -> None:
        """Count rows that are written."""
        self._written += len(rows)

    @property
    def finite(self) -> bool:
        """Whether no row held NaN or infinity."""
        return bool(torch.isfinite(self._host).all())

    def moments(self) -> Moments:
        """Moments of the rows, once `copy_to_host` is done.

        Raises:
            RuntimeError: If other rows were written than were added.
        """
        if self._written != self._count:
            raise RuntimeError(f"{self._written} rows were written and {self._count} added up on the device")
        total, squares = self._host.numpy()
        return moments_of_sums(self._count, total, squares, self._row_shape)


def sums_for(recipe: Recipe, device: torch.device) -> TorchSums | None:
    """Return what sums a shard's tokens faster than its writer does; None unless they are float16.

    Args:
        recipe: Of the store that is written.
        device: Where its tokens are made.
    """
    if recipe.dtype != "float16":
        return None
    row_shape = (recipe.encoder.num_tokens, recipe.encoder.width)
    if device.type == "cuda":
        return DeviceSums(row_shape, device)
    return TorchSums(row_shape, torch.device("cpu"))
