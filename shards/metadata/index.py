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
from shards.metadata.tables import open_table, read_columns

if TYPE_CHECKING:
    import pyarrow as pa

_COLUMNS = {
    "row": "int64",
    "key": "string",
    "label": "int32",
    "uri": "string",
    "offset": "int64",
    "nbytes": "int64",
    "valid": "bool",
    "reason": "string",
}
Commits = Mapping[tuple[str, int], CommitRecord]
ABSENT = -1
"""Offset of a row that is not there."""


def bad_rows(recipe: Recipe, plan: Plan, commits: Commits) -> dict[int, str]:
    """Return reason by row for each image that is not present in every view."""
    reasons: dict[int, dict[str, str]] = {}
    for (view, shard), record in sorted(commits.items()):
        for slot, reason in record.bad.items():
            reasons.setdefault(shard * recipe.capacity + slot, {})[view] = reason
    return {row: _in_words(recipe, reasons[row]) for row in sorted(reasons)}


def _in_words(recipe: Recipe, by_view: dict[str, str]) -> str:
    """Return the reason, said once where it is the same in all views of the store."""
    if len(by_view) == len(recipe.views) and len(set(by_view.values())) == 1:
        return by_view[recipe.views[0]]
    return "; ".join(f"{view}: {reason}" for view, reason in by_view.items())


def build_index(recipe: Recipe, plan: Plan, commits: Commits) -> pa.Table:
    """Return the columns of ``index.parquet``, a line an image, in row order.

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
    """Return the index as a parquet file; the same table gives the same bytes under one version of pyarrow."""
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


class Index:
    """Columns of a finished store's index by row, read when they are asked for.

    Args:
        content: The file.
        plan_rows: Row of each image, ascending; of an earlier stage of an extended store, of its images only.
        num_rows: Rows of every array.
        path: What to call it in errors.
        num_images: Images that the file is of, if they are more than those in ``plan_rows``.
    """

    def __init__(
        self,
        content: bytes,
        plan_rows: NDArray[np.int64],
        num_rows: int,
        *,
        path: object,
        num_images: int | None = None,
    ) -> None:
        import pyarrow as pa

        self._rows = plan_rows
        self._num_rows = num_rows
        self._path = path
        try:
            self._file = open_table(content, _COLUMNS)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise StoreDamagedError(f"{path} is not a readable index ({error})") from error
        expected = len(plan_rows) if num_images is None else num_images
        if self._file.metadata.num_rows != expected:
            raise StoreDamagedError(
                f"{path} has {self._file.metadata.num_rows} rows, the recipe {expected} images"
            )

    @property
    def column_names(self) -> list[str]:
        """Names of the columns."""
        return list(self._file.schema_arrow.names)

    def table(self, *columns: str) -> pa.Table:
        """Return some columns, or all, a line an image in row order."""
        import pyarrow as pa

        try:
            table = read_columns(self._file, list(columns))
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise StoreDamagedError(f"{self._path} is not a readable index ({error})") from error
        return table if table.num_rows == len(self._rows) else table.slice(0, len(self._rows))

    def checksums(self, path: str) -> NDArray[np.uint32]:
        """Return the CRC32C of each row of a field, uint32[num_rows]; 0 where no row is."""
        return self._by_row(f"{path}/crc32c", np.uint32, 0)

    def offsets(self, path: str) -> NDArray[np.int64]:
        """Return the first byte of each row of a field in its object, int64[num_rows]; -1 where no row is."""
        return self._by_row(f"{path}/offset", np.int64, ABSENT)

    def _by_row(self, column: str, dtype: type[Any], fill: int) -> NDArray[Any]:
        if column not in self.column_names:
            raise StoreDamagedError(f"{self._path} has no column {column!r}")
        found = self.table(column)[column].to_numpy()
        if found.dtype != dtype:
            raise StoreDamagedError(
                f"{self._path} has {found.dtype} in column {column!r} instead of {np.dtype(dtype)}"
            )
        by_row = np.full(self._num_rows, fill, dtype)
        by_row[self._rows] = found
        return by_row
