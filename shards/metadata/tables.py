"""Parquet files inside stores, read with their rows, types and sizes bounded by the size of the file.

A store may come from a stranger, and a parquet file of a kilobyte may claim to hold terabytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_LARGEST_UNSUSPICIOUS = 256 << 20
_LARGEST_RATIO = 100
"""Bytes that a byte of the file may become. Plans and indices shrink to a fifth at most: each key is different, and its
slot is drawn at random."""
_LARGEST_TEXT = 1 << 16
"""Bytes of a key, an address or a reason."""


def open_table(content: bytes, columns: Mapping[str, str]) -> Any:
    """Return a parquet file that certain columns are to be read from.

    Args:
        content: The file.
        columns: Type by name of columns that it must have.

    Raises:
        ValueError: If it claims more than a file of this size can hold, or its columns are others.
        pyarrow.ArrowException: If it is no parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Threads of pyarrow may outlive the interpreter and free the buffer then: SIGABRT.
    file = pq.ParquetFile(pa.BufferReader(content), pre_buffer=False, read_dictionary=_texts(columns))
    metadata = file.metadata
    if not 0 <= metadata.num_rows <= len(content):
        raise ValueError(f"it claims {metadata.num_rows} rows in {len(content)} bytes")
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    unpacked = sum(max(0, group.total_byte_size) for group in groups)
    if unpacked > max(_LARGEST_UNSUSPICIOUS, _LARGEST_RATIO * len(content)):
        raise ValueError(f"it would unfold from {len(content)} to {unpacked} bytes")
    schema = file.schema_arrow
    for name, kind in columns.items():
        found = [str(field.type) for field in schema if field.name == name]
        expected = (kind, f"dictionary<values={kind}, indices=int32, ordered=0>")
        if len(found) != 1 or found[0] not in expected:
            raise ValueError(f"its column {name} must be of {kind}, found {', '.join(found) or 'none'}")
    return file


def read_columns(file: Any, names: Sequence[str]) -> Any:
    """Read some columns of an open file, or all of them, as one table without chunks.

    Raises:
        ValueError: If a text is longer than any of ours.
        pyarrow.ArrowException: If a page cannot be read.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    table = file.read(list(names) or None, use_threads=False).combine_chunks()
    for index, name in enumerate(table.column_names):
        column = table.column(index)
        if not pa.types.is_dictionary(column.type):
            continue
        for chunk in column.chunks:
            longest = pc.max(pc.binary_length(chunk.dictionary)).as_py() or 0
            if longest > _LARGEST_TEXT:
                raise ValueError(f"its column {name} holds a text of {longest} bytes")
        table = table.set_column(
            index, pa.field(name, column.type.value_type), column.cast(column.type.value_type)
        )
    return table.combine_chunks()


def read_table(content: bytes, columns: Mapping[str, str]) -> Any:
    """Read exactly these columns of a parquet file, none with a missing value; see `open_table`.

    Raises:
        ValueError: If they cannot be what we have written.
        pyarrow.ArrowException: If it cannot be read.
    """
    table = read_columns(open_table(content, columns), list(columns))
    for name in columns:
        if table[name].null_count:
            raise ValueError(f"its column {name} has rows without a value")
    return table


def _texts(columns: Mapping[str, str]) -> list[str]:
    return [name for name, kind in columns.items() if kind == "string"]
