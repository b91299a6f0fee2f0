"""The index of a finished store: of each image its row, its source, whether it is valid, its checksums."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import StoreDamagedError
from shards.metadata.commit import CommitRecord
from shards.metadata.identity import Recipe
from shards.metadata.layout import fields_of
from shards.metadata.plan import Plan

if TYPE_CHECKING:
    import pyarrow as pa

Commits = Mapping[tuple[str, int], CommitRecord]
ABSENT = -1
"""Offset of a row that is not there."""


def bad_rows(recipe: Recipe, plan: Plan, commits: Commits) -> dict[int, str]:
    """Reason by row for each image that is not present in every view."""
    reasons: dict[int, dict[str, str]] = {}
    for (view, shard), record in sorted(commits.items()):
        for place, reason in record.bad.items():
            reasons.setdefault(shard * recipe.capacity + place, {})[view] = reason
    return {row: _in_words(recipe, reasons[row]) for row in sorted(reasons)}


def _in_words(recipe: Recipe, by_view: dict[str, str]) -> str:
    """The reason, said once where it is the same in all views of the store."""
    if len(by_view) == len(recipe.views) and len(set(by_view.values())) == 1:
        return by_view[recipe.views[0]]
    return "; ".join(f"{view}: {reason}" for view, reason in by_view.items())


def build_index(recipe: Recipe, plan: Plan, commits: Commits) -> pa.Table:
    """The columns of ``index.parquet``, a line an image, in row order.

    ``row``, the plan's ``key``, ``label``, ``uri``, ``offset`` and ``nbytes``, of repaired images the size they have
    now; ``valid`` and ``reason``; for each view and field ``VIEW/FIELD/crc32c``, and ``VIEW/FIELD/offset`` in forms
    without an index of their own.
    """
    import pyarrow as pa

    rows = plan.rows
    bad = bad_rows(recipe, plan, commits)
    valid = ~np.isin(rows, np.fromiter(bad, np.int64, len(bad)))
    columns: dict[str, Any] = {"row": pa.array(rows)}
    columns |= {name: plan.table[name] for name in plan.table.column_names}
    columns["nbytes"] = pa.array(plan.nbytes, pa.int64())
    columns["valid"] = pa.array(valid)
    columns["reason"] = pa.array(
        [bad.get(row) for row in rows.tolist()] if bad else [None] * len(rows), pa.string()
    )
    for view in recipe.views:
        for field in fields_of(recipe, view):
            records = [commits[view, shard] for shard in range(recipe.num_shards)]
            checksums = np.concatenate([record.crc32c[field.name] for record in records])
            columns[f"{field.path}/crc32c"] = pa.array(checksums[rows], pa.uint32())
            if any(field.name in record.offsets for record in records):
                offsets = np.concatenate([record.offsets[field.name] for record in records])
                columns[f"{field.path}/offset"] = pa.array(offsets[rows], pa.int64())
    return pa.table(columns)


def index_bytes(table: pa.Table) -> bytes:
    """The index as a parquet file; the same table gives the same bytes under one version of pyarrow."""
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


class Index:
    """Columns of a finished store's index by row, read when they are asked for."""

    def __init__(self, content: bytes, plan_rows: NDArray[np.int64], num_rows: int, *, path: object) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._rows = plan_rows
        self._num_rows = num_rows
        self._path = path
        try:
            # Threads of pyarrow may outlive the interpreter and free the buffer then: SIGABRT.
            self._file = pq.ParquetFile(pa.BufferReader(content), pre_buffer=False)
        except pa.ArrowInvalid as error:
            raise StoreDamagedError(f"{path} is not a readable index ({error})") from error

    @property
    def column_names(self) -> list[str]:
        """Names of the columns."""
        return list(self._file.schema_arrow.names)

    def table(self, *columns: str) -> pa.Table:
        """Some columns, or all, a line an image in row order."""
        return self._file.read(list(columns) or None, use_threads=False)

    def checksums(self, path: str) -> NDArray[np.uint32]:
        """CRC32C of each row of a field, uint32[num_rows]; 0 where no row is."""
        return self._by_row(f"{path}/crc32c", np.uint32, 0)

    def offsets(self, path: str) -> NDArray[np.int64]:
        """First byte of each row of a field in its object, int64[num_rows]; -1 where no row is."""
        return self._by_row(f"{path}/offset", np.int64, ABSENT)

    def _by_row(self, column: str, dtype: type[Any], fill: int) -> NDArray[Any]:
        if column not in self.column_names:
            raise StoreDamagedError(f"{self._path} has no column {column!r}")
        by_row = np.full(self._num_rows, fill, dtype)
        by_row[self._rows] = self.table(column)[column].to_numpy()
        return by_row
