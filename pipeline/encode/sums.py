"""Exact sums of float16 tokens by torch: the bits of `shards`' own, on the processor or where the tokens were made.

Products of two float16 are exact in float64, so a fused multiply-add rounds as two operations do; rows are added one
after another as `shards.values.moments.RowSums` adds them. `tests/pipeline/test_sums.py` compares the bits.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards import Moments, Recipe, moments_of_sums

_TILE = 32768
"""Columns worked on at a time on a processor: three tiles of float64 stay in the second-level cache."""

_SMALL_ROWS = range(256, 16384)
"""Numbers of a row, such as compact latents, whose blocks are added up in a few calls: a call a row would cost more."""

_FUSED_ROWS = 16
"""Rows that one compiled call adds up, which reads and writes the sums once for all of them."""


def add_rows(total: Tensor, squares: Tensor, rows: Tensor) -> None:
    """Add rows float16 [k, n] and their squares to sums float64 [n], one row after another."""
    for row in rows.unbind():
        values = row.double()
        total.add_(values)
        squares.addcmul_(values, values)


@cache
def compiled_add_rows() -> Callable[[Tensor, Tensor, Tensor], None]:
    """`add_rows` of `_FUSED_ROWS` rows as one kernel."""
    return torch.compile(add_rows, dynamic=False)


def add_small_rows(sums: NDArray[np.float64], rows: Tensor) -> None:
    """Add rows float16 [k, n] and their squares to sums [2, n] a block at a time, still one row after another.

    numpy adds up the first axis of several columns row by row; a single column it would add in pairs.
    """
    work = torch.empty((len(rows) + 1, rows.shape[1]), dtype=torch.float64)
    work[1:].copy_(rows.float())
    block = work.numpy()
    with np.errstate(invalid="ignore"):  # infinities are for `finite` to find
        block[0] = sums[0]
        np.add.reduce(block, axis=0, out=sums[0])
        np.square(block[1:], out=block[1:])
        block[0] = sums[1]
        np.add.reduce(block, axis=0, out=sums[1])


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
    def update(self, rows: NDArray[Any]) -> None:
        """Add rows float16 [k, *row_shape] in order of slot."""
        flat = torch.from_numpy(rows).reshape(len(rows), -1)
        self._count += len(rows)
        if flat.shape[1] in _SMALL_ROWS:
            add_small_rows(self._sums.numpy(), flat)
            return
        for start in range(0, flat.shape[1], _TILE):
            total, squares = self._sums[:, start : start + _TILE]
            columns = flat[:, start : start + _TILE]
            single = torch.empty_like(total, dtype=torch.float32)
            values = torch.empty_like(total)
            for row in columns:
                # By way of float32: processors widen that far in one instruction, and a whole vector at a time.
                values.copy_(single.copy_(row))
                total.add_(values)
                squares.addcmul_(values, values)

    @property
    def finite(self) -> bool:
        """Whether no row held NaN or infinity."""
        return bool(torch.isfinite(self._sums).all())

    @property
    def has_nan(self) -> bool:
        """Whether a row held NaN; squares of infinity do not add up to it."""
        return bool(torch.isnan(self._sums[1]).any())

    def moments(self) -> Moments:
        """Return the moments of the rows added so far, which must be `finite`."""
        total, squares = self._sums.cpu().numpy()
        return moments_of_sums(self._count, total, squares, self._row_shape)


class DeviceSums(TorchSums):
    """Sums that `add` makes where the encoder put the tokens; the rows that are written are only counted.

    They are copied to the host with the shard's last rows, so that whoever publishes the shard need not wait for what
    the device was asked to do since.

    Args:
        row_shape: Shape of a row.
        device: Where the sums are kept.
        compiled: Whether rows are added by a compiled kernel: a launch for sixteen of them in place of three for each,
            with the same bits.
    """

    def __init__(self, row_shape: tuple[int, ...], device: torch.device, *, compiled: bool = False) -> None:
        super().__init__(row_shape, device)
        self._compiled = compiled
        self._written = 0
        self._host = torch.empty(self._sums.shape, dtype=torch.float64, pin_memory=device.type == "cuda")

    @property
    def copy_to_host(self) -> tuple[Tensor, Tensor]:
        """The sums, and where on the host they are looked for."""
        return self._sums, self._host

    @torch.inference_mode()
    def add(self, rows: Tensor, slots: Sequence[int]) -> None:
        """Add some of the rows float16 [k, *row_shape], which are on the sums' device, one after another."""
        flat = rows.reshape(len(rows), -1)
        chosen = flat if len(slots) == len(flat) else flat[torch.tensor(slots, device=flat.device)]
        total, squares = self._sums
        for start in range(0, len(slots), _FUSED_ROWS):
            some = chosen[start : start + _FUSED_ROWS]
            (compiled_add_rows() if self._compiled and len(some) == _FUSED_ROWS else add_rows)(
                total, squares, some
            )
        self._count += len(slots)

    def update(self, rows: NDArray[Any]) -> None:
        """Count rows that are written."""
        self._written += len(rows)

    @property
    def finite(self) -> bool:
        """Whether no row held NaN or infinity."""
        return bool(torch.isfinite(self._host).all())

    def moments(self) -> Moments:
        """Return the moments of the rows, once `copy_to_host` is done.

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
        return DeviceSums(
            row_shape, device, compiled=recipe.execution is not None and recipe.execution.compiled
        )
    return TorchSums(row_shape, torch.device("cpu"))
