"""The rows of a selection, as a new store takes them: read, checked, and in its storage type."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.metadata.layout import fields_of
from shards.reading.reader import RowReader
from shards.values.dtypes import storage_type, to_storage
from shards.writing.finalize import read_commits
from shards.writing.selection import Selection
from shards.writing.store_writer import StoreWriter


@dataclass(frozen=True)
class Block:
    """Consecutive slots of a shard with their rows by field, and what int8 has newly lost of each, float64[k, D]."""

    first_slot: int
    arrays: dict[str, NDArray[Any]]
    square_errors: NDArray[np.float64] | None


class SelectedRows:
    """The rows of a selection by their new slot, read, checked and brought to the new storage type."""

    def __init__(self, selection: Selection, writer: StoreWriter) -> None:
        self.stores = selection.stores
        self.writer = writer
        self.commits = [read_commits(store.path, store.recipe) for store in selection.stores]
        self.store_of = np.full(writer.recipe.num_rows, -1)
        self.row_of = np.full(writer.recipe.num_rows, -1)
        self.store_of[selection.plan.rows] = selection.store_of
        self.row_of[selection.plan.rows] = selection.row_of
        self._readers: dict[tuple[int, str], RowReader] = {}

    @cached_property
    def as_they_are(self) -> list[bool]:
        """For each store, whether its tokens stay bit for bit."""
        recipe = self.writer.recipe
        return [(s.recipe.dtype, s.recipe.code) == (recipe.dtype, recipe.code) for s in self.stores]

    def slots(self, shard: int) -> slice:
        """Return the new rows of a shard that hold images."""
        rows = self.writer.plan.rows_of(shard)
        return slice(rows.start, rows.stop)

    def bad(self, view: str, shard: int) -> dict[int, str]:
        """Return reason by slot, for each image of a new shard that its store has no row of in this view."""
        found = {}
        origin = zip(self.store_of[self.slots(shard)], self.row_of[self.slots(shard)], strict=True)
        for slot, (index, row) in enumerate(origin):
            old_shard, old_slot = divmod(int(row), self.stores[index].capacity)
            reason = self.commits[index][view, old_shard].bad.get(old_slot)
            if reason is not None:
                found[slot] = reason
        return found

    def block(self, view: str, first: int, stop: int) -> Block:
        """Read new rows ``first`` to ``stop``, all of which are there."""
        stores, rows = self.store_of[first:stop], self.row_of[first:stop]
        arrays = {
            field.name: np.empty((stop - first, *field.row_shape), field.dtype.numpy)
            for field in fields_of(self.writer.recipe, view)
        }
        errors = None
        for index in np.unique(stores).tolist():
            at = np.flatnonzero(stores == index)
            at = at[np.argsort(rows[at])]  # each store is read from front to back
            for name, out in arrays.items():
                reader = self._reader(index, f"{view}/{name}")
                if name == "tokens" and not self.as_they_are[index]:
                    stored = np.empty((len(at), *reader.row_shape), reader.dtype)
                    reader.read(rows[at], stored)
                    out[at], lost = self._recoded(index, stored)
                    if lost is not None:
                        errors = np.zeros((len(stores), lost.shape[1])) if errors is None else errors
                        errors[at] = lost
                else:
                    reader.read(rows[at], out, at.tolist())
        return Block(first % self.writer.recipe.capacity, arrays, errors)

    def _reader(self, index: int, path: str) -> RowReader:
        if (index, path) not in self._readers:
            view, _, name = path.partition("/")
            self._readers[index, path] = self.stores[index].reader(view, name, verify="always")
        return self._readers[index, path]

    def _recoded(self, index: int, stored: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.float64] | None]:
        values = self.stores[index].decode(stored)
        if self.writer.code is not None:
            return self.writer.code.encode_rows(values)
        return to_storage(values, storage_type(self.writer.recipe.dtype)), None

    def old_error(self, view: str, shard: int, present: NDArray[np.bool_]) -> NDArray[np.float64] | None:
        """Return the int8 error of the rows of a new shard before they were copied, float64[D].

        A store knows the error of each of its shards; a row's is taken to be its shard's mean. Of a store copied whole
        nothing is lost by that.

        Returns:
            None if some of it is not known.
        """
        total = np.zeros(self.writer.recipe.encoder.width)
        part = self.slots(shard)
        origin = zip(self.store_of[part][present], self.row_of[part][present], strict=True)
        counts = Counter((int(s), int(row) // self.stores[s].capacity) for s, row in origin)
        for (index, old_shard), count in sorted(counts.items()):
            if self.stores[index].code is None:
                continue
            record = self.commits[index][view, old_shard]
            assert record.square_error is not None, (view, old_shard)
            total += record.square_error * (count / record.num_rows)
        return total if np.isfinite(total).all() else None
