"""Reading parquet columns in steps that fit into memory, whatever the file claims."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from shards.errors import SourceDamagedError, UsageError
from shards.sources.parquet_pages import PageSizes, page_sizes
from shards.storage.location import Location, open_object, storage_of

_LARGEST_GROUP = 4 << 30
LARGEST_UNSUSPICIOUS = 256 << 20
"""Bytes that a row group may unfold to whatever its stored size is."""
LARGEST_RATIO = 10
"""Bytes that a larger row group may unfold to for each stored byte."""


def bounded_batches(
    path: Location, file: Any, group: int, columns: list[str], rows: int | None = None
) -> Iterator[Any]:
    """Yield some columns of a row group, a few rows at a time; no byte of another column is read.

    What footer and page headers say is looked at before a page is decoded, and what the rows come to after each step. A
    step is so small that the dictionary pages' values, repeated in each of its rows, fit into memory.

    Args:
        path: The file.
        file: The same, as pyarrow has opened it.
        group: Number of the row group.
        columns: Names of columns, or of their parts.
        rows: Most rows of a step; None for as many as the group has.

    Raises:
        UsageError: If they unfold to too much.
        SourceDamagedError: If a page's header cannot be read.
    """
    described = file.metadata.row_group(group)
    parts = [described.column(number) for number in range(described.num_columns)]
    wanted = [part for part in parts if any(_belongs(part.path_in_schema, column) for column in columns)]
    stored = sum(part.total_compressed_size for part in wanted)
    _require_bounded(group, stored, sum(part.total_uncompressed_size for part in wanted))
    pages = _page_sizes(path, group, wanted)
    _require_bounded(group, stored, sum(sizes.unfolded for sizes in pages))
    repeated = sum(sizes.dictionary for sizes in pages)
    at_once = min(rows or described.num_rows, LARGEST_UNSUSPICIOUS // repeated if repeated else 1 << 31)
    unfolded = 0
    for batch in file.iter_batches(
        batch_size=max(1, at_once), row_groups=[group], columns=columns, use_threads=False
    ):
        unfolded += batch.nbytes
        _require_bounded(group, stored, unfolded)
        yield batch


def _page_sizes(path: Location, group: int, chunks: list[Any]) -> list[PageSizes]:
    """Return the sizes of the pages of some columns.

    On a server a header would cost a request. There the columns are taken to unfold to what the footer says, which a
    single page of theirs can exceed, up to the 2 GiB that its header can say.
    """
    if storage_of(path).is_remote:
        return [
            PageSizes(size, size if chunk.has_dictionary_page else 0)
            for chunk in chunks
            for size in [chunk.total_uncompressed_size]
        ]
    with open_object(path) as content:
        try:
            return [page_sizes(content.read, chunk) for chunk in chunks]
        except ValueError as error:
            raise SourceDamagedError(
                f"{path} is not a readable parquet file (row group {group}: {error}); download it again"
            ) from error


def _require_bounded(group: int, stored: int, unfolded: int) -> None:
    """Refuse a row group that unfolds to more than memory can hold.

    Raises:
        UsageError: Naming the row group and its size.
    """
    suspicious = unfolded > LARGEST_UNSUSPICIOUS and unfolded > LARGEST_RATIO * max(stored, 1)
    if unfolded < 0 or stored < 0 or unfolded > _LARGEST_GROUP or suspicious:
        raise UsageError(
            f"a row group of images must unfold to no more than {_LARGEST_GROUP >> 30} GiB and {LARGEST_RATIO} times "
            f"its stored bytes, group {group} has {stored} bytes that unfold to {unfolded}; write smaller row groups"
        )


def _belongs(path: str, column: str) -> bool:
    return path == column or path.startswith(f"{column}.")
