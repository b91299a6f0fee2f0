"""Single images out of parquet files, which can only be read in whole row groups."""

import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.storage.location import Location

_CACHED_GROUPS = 4


@dataclass(frozen=True)
class _Table:
    """What is known of a parquet file.

    Attributes:
        metadata: Its footer.
        column: The column of images.
        ends: Number of the first row behind each row group.
    """

    metadata: Any
    column: str
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

    def read(self, path: Location, row: int) -> bytes | None:
        """Bytes of the image in a row, None where it holds none.

        Raises:
            OSError: If the file is gone or cannot be read.
        """
        table = self._table(path)
        group = int(np.searchsorted(table.ends, row, side="right"))
        first = int(table.ends[group - 1]) if group else 0
        content: bytes | None = self._values(path, table, group)[row - first].as_py()
        return content

    def _table(self, path: Location) -> _Table:
        if path not in self._tables:
            from shards.sources.tables import image_column, open_parquet

            with open_parquet(path) as file:
                column = image_column(file.schema_arrow)
                assert column is not None, "the plan lists rows of this file"
                counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                self._tables[path] = _Table(file.metadata, column, np.cumsum(counts))
        return self._tables[path]

    def _values(self, path: Location, table: _Table, group: int) -> Any:
        """A row group's images; one thread decodes it, others that want it wait."""
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


def _decoded_group(path: Location, table: _Table, group: int) -> Any:
    from shards.sources.tables import open_parquet

    with open_parquet(path, table.metadata) as file:
        read = file.read_row_group(group, columns=[f"{table.column}.bytes"], use_threads=False)
    return read.column(table.column).combine_chunks().field("bytes")
