"""The stream of several stores: which store each position comes from, and which of its rows.

A store's share of the stream is exact. Positions come in blocks; a block holds each store a fixed number of times, in
an order drawn for the block. So how often a store was read before a position is arithmetic, each store goes through its
own stream (`shards.reading.order.RowOrder`) row by row, and a run continues from the number of samples alone.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shards.draws import permutation
from shards.errors import UsageError
from shards.reading.order import RowOrder

BLOCK = 1 << 16
"""Units of a block; weights are rounded to whole units, so to 1/65536."""

Unit = Literal["sample", "step"]
"""What a store is drawn for: every sample by itself, or all samples of a step."""


@dataclass(frozen=True)
class Phase:
    """Weights that hold from a step on.

    Attributes:
        first_step: First step that they hold for.
        weights: One a store, not negative, with a positive sum.
    """

    first_step: int
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse weights that are no shares."""
        usable = all(np.isfinite(weight) and weight >= 0 for weight in self.weights)
        if not usable or not sum(self.weights) > 0:
            raise UsageError(
                f"weights of stores must be 0 or more with a positive sum, got {', '.join(map(str, self.weights))}"
            )

    def units(self) -> NDArray[np.int64]:
        """Return the units of a block for each store, by largest remainders; their sum is `BLOCK`.

        Raises:
            UsageError: If a weight above 0 is too small to get one.
        """
        shares = np.array(self.weights, np.float64) / sum(self.weights) * BLOCK
        units = np.floor(shares).astype(np.int64)
        largest = np.argsort(units - shares, kind="stable")[: BLOCK - int(units.sum())]
        units[largest] += 1
        starved = [
            str(weight) for weight, n in zip(self.weights, units, strict=True) if weight > 0 and n == 0
        ]
        if starved:
            raise UsageError(
                f"weight {starved[0]} is less than 1/{BLOCK} of all; raise it or leave the store out"
            )
        return units


class MixtureOrder:
    """The infinite stream of rows of several stores.

    Args:
        orders: The stream of each store.
        bases: Number of each store's first row among the rows of all.
        phases: Weights, by ascending first step; the first holds from step 0.
        unit: What a store is drawn for.
        seed: Names the draws.
        global_batch_size: Samples of a step, over all ranks.
    """

    def __init__(
        self,
        orders: Sequence[RowOrder],
        bases: Sequence[int],
        phases: Sequence[Phase],
        *,
        unit: Unit,
        seed: int,
        global_batch_size: int,
    ) -> None:
        steps = [phase.first_step for phase in phases]
        if not phases or steps[0] != 0 or any(a >= b for a, b in itertools.pairwise(steps)):
            raise UsageError(
                f"weights must hold from step 0 and change at ascending steps, got steps {steps}"
            )
        if any(len(phase.weights) != len(orders) for phase in phases):
            raise UsageError(f"{len(orders)} stores need {len(orders)} weights in each phase")
        self._orders, self._bases, self._seed = list(orders), list(bases), seed
        self._samples_a_unit = 1 if unit == "sample" else global_batch_size
        per_step = global_batch_size if unit == "sample" else 1
        self._firsts = [step * per_step for step in steps]  # in units
        self._units = [phase.units() for phase in phases]
        self._blocks: dict[tuple[int, int], NDArray[np.int8]] = {}
        self._lock = threading.Lock()
        self._before = [np.zeros(len(orders), np.int64)]
        for phase, first, end in zip(range(len(phases)), self._firsts, self._firsts[1:], strict=False):
            self._before.append(self._before[-1] + self._count(phase, end - first))

    def rows(self, start: int, count: int) -> NDArray[np.int64]:
        """Return rows at the stream's positions [start, start + count), numbered over all stores, int64[count]."""
        parts = []
        end = start + count
        while start < end:
            unit, inside = divmod(start, self._samples_a_unit)
            phase = int(np.searchsorted(self._firsts, unit, side="right")) - 1
            block, at = divmod(unit - self._firsts[phase], BLOCK)
            stop = BLOCK if phase + 1 == len(self._firsts) else min(BLOCK, self._units_left(phase, block))
            last = min(stop, at + -(-(end - start + inside) // self._samples_a_unit))
            taken = min(end - start, (last - at) * self._samples_a_unit - inside)
            parts.append(self._rows_of(phase, block, at, last, inside, taken))
            start += taken
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def stores(self, start: int, count: int) -> NDArray[np.int64]:
        """Return the store that each position comes from, int64[count]."""
        return np.searchsorted(self._bases, self.rows(start, count), side="right") - 1

    def _units_left(self, phase: int, block: int) -> int:
        return self._firsts[phase + 1] - self._firsts[phase] - block * BLOCK

    def _rows_of(
        self, phase: int, block: int, at: int, last: int, inside: int, taken: int
    ) -> NDArray[np.int64]:
        """Return the rows of ``taken`` samples of a block, from sample ``inside`` of unit ``at`` on."""
        drawn = self._block(phase, block)
        before = (
            self._before[phase]
            + block * self._units[phase]
            + np.bincount(drawn[:at], minlength=len(self._orders))
        )
        chosen = np.repeat(drawn[at:last], self._samples_a_unit)[inside : inside + taken]
        rows = np.empty(taken, np.int64)
        for store, order in enumerate(self._orders):
            where = np.flatnonzero(chosen == store)
            if len(where):
                first = int(before[store]) * self._samples_a_unit
                first += inside if drawn[at] == store else 0
                rows[where] = order.rows(first, len(where)) + self._bases[store]
        return rows

    def _block(self, phase: int, block: int) -> NDArray[np.int8]:
        """Return the store of each unit of a block, int8[BLOCK]."""
        with self._lock:
            drawn = self._blocks.get((phase, block))
            if drawn is None:
                stores = np.repeat(np.arange(len(self._orders), dtype=np.int8), self._units[phase])
                drawn = stores[permutation(BLOCK, seed=self._seed, stream=f"mixture/{phase}", epoch=block)]
                # A batch may straddle two blocks; older ones will not be asked for again.
                self._blocks = dict(list(self._blocks.items())[-1:]) | {(phase, block): drawn}
        return drawn

    def _count(self, phase: int, units: int) -> NDArray[np.int64]:
        """Return how often each store comes in the first units of a phase."""
        blocks, rest = divmod(units, BLOCK)
        counts = blocks * self._units[phase]
        return counts + np.bincount(self._block(phase, blocks)[:rest], minlength=len(self._orders))
