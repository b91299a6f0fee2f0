"""Single images out of parquet files, which can only be read in whole row groups."""

import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.metadata.archives import ArchiveIdentity
from shards.sources.archives import RowsDigest, identity_now
from shards.sources.parquet_bounds import bounded_batches
from shards.sources.parquet_files import (
    ImageColumn,
    batches,
    first_image_column,
    image_column,
    open_parquet,
)
from shards.storage.location import Location

_CACHED_GROUPS = 4


class SourceChangedError(UserError):
    """An archive is not the one that was listed, and its images cannot be identified."""


@dataclass(frozen=True)
class _Table:
    """What is known of a parquet file.

    Attributes:
        metadata: Its footer.
        column: The column of images.
        ends: Number of the first row behind each row group.
    """

    metadata: Any
    column: ImageColumn
    ends: NDArray[np.int64]


class ParquetRows:
    """Image bytes by row number; may be used by several threads at once.

    Threads decode different row groups side by side, each through a file of its own, as one file is not made for
    several threads. The groups used last are kept, which helps where a file has few of them.
    """

    def __init__(self) -> None:
        self._tables: dict[Location, _Table] = {}
        self._groups: OrderedDict[tuple[Location, int], Future[Any]] = OrderedDict()
        self._lock = threading.Lock()
        self._opening = threading.Lock()

    def read(self, path: Location, row: int, listed: ArchiveIdentity | None = None) -> bytes | str | None:
        """Return the bytes of the image in a row; where it holds none, the path it names, if it does.

        Args:
            path: The file.
            row: Number of the row in it.
            listed: What the file was when it was listed, where that is known.

        Raises:
            SourceChangedError: If it is not the file that was listed.
            OSError: If the file is gone or cannot be read.
        """
        table = self._table(path, listed)
        group = int(np.searchsorted(table.ends, row, side="right"))
        if not 0 <= row < int(table.ends[-1] if len(table.ends) else 0):
            return None
        first = int(table.ends[group - 1]) if group else 0
        content, paths = self._values(path, table, group)
        value: bytes | None = content[row - first].as_py()
        return paths[row - first] if value is None else value

    def require_same(self, path: Location, listed: ArchiveIdentity) -> None:
        """Raise `SourceChangedError` if a file is not the one that was listed."""
        self._table(path, listed)

    def _table(self, path: Location, listed: ArchiveIdentity | None) -> _Table:
        with self._opening:
            if path not in self._tables:
                self._tables[path] = _opened(path, listed)
            return self._tables[path]

    def _values(self, path: Location, table: _Table, group: int) -> Any:
        """Return a row group's images; one thread decodes it, others that want it wait."""
        key = path, group
        with self._lock:
            found = self._groups.get(key)
            values: Future[Any] = Future() if found is None else found
            self._groups[key] = values
            self._groups.move_to_end(key)
            if len(self._groups) > _CACHED_GROUPS:
                self._groups.popitem(last=False)
        if found is None:
            try:
                values.set_result(_decoded_group(path, table, group))
            except BaseException as error:
                values.set_exception(error)
                with self._lock:
                    self._groups.pop(key, None)  # whoever asks again, tries again
        return values.result()


def _opened(path: Location, listed: ArchiveIdentity | None) -> _Table:
    with open_parquet(path) as file:
        # Plans from before archives were described took the first column.
        column = image_column(file, path, listed.column) if listed else first_image_column(file)
        if column is None:
            raise SourceChangedError(f"{path} has no column of images any more; bring the old file back")
        _require_same_rows(path, file, column, listed)
        counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        return _Table(file.metadata, column, np.cumsum(counts))


def _decoded_group(path: Location, table: _Table, group: int) -> tuple[Any, list[str | None]]:
    """Return the images of a row group, and the paths of those rows that have one."""
    import pyarrow as pa

    with open_parquet(path, table.metadata) as file:
        steps = list(bounded_batches(path, file, group, table.column.columns))
    column = pa.chunked_array([step.column(table.column.name) for step in steps]).combine_chunks()
    return table.column.content(column), table.column.paths(column)


def _require_same_rows(
    path: Location, file: Any, column: ImageColumn, listed: ArchiveIdentity | None
) -> None:
    """Refuse a file that was rewritten since it was listed, because its rows have nothing but their numbers.

    A file that was only touched or copied has another time; all its images are then read once and compared.
    """
    if listed is None or listed.same_file(identity_now(path)):
        return
    digest = RowsDigest()
    for batch in batches(path, file, column.columns):
        for value in column.content(batch.column(column.name)):
            digest.add(value.as_buffer() if value.is_valid else None)
    if digest.hex() != listed.rows:
        raise SourceChangedError(
            f"{path} is not the file that was listed: it was rewritten ({listed.nbytes} bytes then, "
            f"{identity_now(path).nbytes} now), and its rows are other images; bring the old file back, or "
            "encode this one "
            "into a new store"
        )
