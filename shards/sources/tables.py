"""Images that a table names: HuggingFace-style parquet with the bytes inside, or a list of paths."""

import csv
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from shards.errors import UsageError
from shards.sources.folder import whole_address
from shards.sources.found import FoundImage
from shards.storage.location import Location, as_location, file_size, object_sizes
from shards.storage.remote_path import RemotePath, is_url

_PATH_COLUMNS = ("path", "file_name", "image_path", "file", "filename", "uri")
_LABEL_COLUMNS = ("label", "class", "cls")


def find_in_parquet(paths: list[Location]) -> Iterator[FoundImage]:
    """Every row of parquet files that hold images (`image` struct with `bytes`) or paths of images.

    For images inside, the offset is the number of the row in its file; a row without bytes is the file that its `path`
    names, if that is there. Numbers in the label column stay the class names here; `class_names_in` says what they
    mean.

    Raises:
        UsageError: If a file is damaged, or has no column of images or paths.
    """
    for path in paths:
        with _undamaged(path):
            yield from _rows_of(path)


def _rows_of(path: Location) -> Iterator[FoundImage]:
    import pyarrow.compute as pc

    file = open_parquet(path)
    names = file.schema_arrow.names
    column = image_column(file.schema_arrow)
    label = next((name for name in _LABEL_COLUMNS if name in names), None)
    if column is None:
        yield from _listed(
            path, file.read([name for name in names if name in (*_PATH_COLUMNS, label)]).to_pylist()
        )
        return
    number = 0
    # Columns that are not there are ignored.
    wanted = [f"{column}.bytes", f"{column}.path", *([label] if label else [])]
    for batch in file.iter_batches(batch_size=64, columns=wanted):
        sizes = pc.binary_length(batch.column(column).field("bytes")).to_pylist()
        labels = batch.column(label).to_pylist() if label else [None] * len(sizes)
        beside = _files_beside(path, batch.column(column))
        for size, value, file_beside in zip(sizes, labels, beside, strict=True):
            key = f"{path.stem}/{number:09d}"
            uri = whole_address(file_beside or path)
            offset, nbytes = (0, file_size(file_beside)) if file_beside else (number, size or 0)
            yield FoundImage(key, _class_name(value), uri, offset, nbytes)
            number += 1


def _files_beside(table: Location, images: Any) -> list[Location | None]:
    """For each image that holds no bytes, the file that its `path` names from the table's folder, if it is there."""
    content = images.field("bytes")
    if content.null_count == 0 or "path" not in {part.name for part in images.type}:
        return [None] * len(images)
    names = images.field("path").to_pylist()
    wanted = [
        isinstance(name, str) and not held
        for name, held in zip(names, content.is_valid().to_pylist(), strict=True)
    ]
    paths = [table.parent / name if want else None for name, want in zip(names, wanted, strict=True)]
    return [path if path is not None and path.is_file() else None for path in paths]


def _class_name(label: Any) -> str | None:
    """What a table's label says; -1 stands for none, as in the unlabelled splits of HuggingFace datasets."""
    return None if label is None or str(label) == "-1" else str(label)


def image_column(schema: Any) -> str | None:
    """Name of the column that holds images as a struct with `bytes`, if there is one."""
    import pyarrow as pa

    for field in schema:
        if pa.types.is_struct(field.type) and "bytes" in {part.name for part in field.type}:
            return str(field.name)
    return None


def class_names_in(path: Location) -> tuple[str, ...]:
    """Names of the numbers in a parquet file's label column, where HuggingFace datasets left them; else nothing.

    Source: `datasets` writes its features as JSON under the schema's metadata key `huggingface`.
    """
    schema = open_parquet(path).schema_arrow
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return ()
    for label in _LABEL_COLUMNS:
        if label in features and "names" in features[label]:
            return tuple(f"{number} {name}" for number, name in enumerate(features[label]["names"]))
    return ()


def open_parquet(path: Location, metadata: Any = None) -> Any:
    """A parquet file at any place, of which only the parts that are asked for are read; its footer, if it is known.

    Raises:
        UsageError: If it is no parquet file, or damaged.
    """
    import pyarrow.parquet as pq

    with _undamaged(path):
        return pq.ParquetFile(path.open("rb") if isinstance(path, RemotePath) else path, metadata=metadata)


@contextmanager
def _undamaged(path: Location) -> Iterator[None]:
    """Turns what pyarrow says of a damaged parquet file into one line for its user."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        # Of a damaged page or footer pyarrow says OSError without a number; those of a device have one.
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise
        reason = " ".join(str(error).split())
        raise UsageError(f"{path} is not a readable parquet file ({reason}); download it anew") from error


def find_in_csv(path: Location) -> Iterator[FoundImage]:
    """Every line of a CSV file with a header: a column of paths and, if there is one, a column of labels.

    Raises:
        UsageError: If it is not CSV in UTF-8, there is no column of paths, or a file is not there.
    """
    try:
        content = io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")
        rows = list(csv.DictReader(content))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} must be CSV in UTF-8, got {error}; save it as that") from error
    yield from _listed(path, rows)


def _listed(table: Location, rows: list[dict[str, Any]]) -> Iterator[FoundImage]:
    sizes: dict[str, int] = {}
    if isinstance(table, RemotePath):
        names = {str(row[column]) for row in rows for column in _PATH_COLUMNS if row.get(column)}
        sizes = object_sizes(table.parent, [name for name in names if not is_url(name)])
    for number, row in enumerate(rows, start=2):
        column = next((name for name in _PATH_COLUMNS if row.get(name)), None)
        if column is None:
            raise UsageError(
                f"{table} must have a column of paths ({', '.join(_PATH_COLUMNS)}), line {number} has {list(row)}"
            )
        name = str(row[column])
        # An absolute name stays as it is.
        path = as_location(name) if is_url(name) else table.parent / name
        if name not in sizes and not path.is_file():
            raise UsageError(
                f"every path in {table} must be a file, line {number} names {name}: no such file"
            )
        label = next((row[name] for name in _LABEL_COLUMNS if row.get(name) not in (None, "")), None)
        yield FoundImage(
            key=name,
            class_name=_class_name(label),
            uri=whole_address(path),
            offset=0,
            nbytes=sizes[name] if name in sizes else file_size(path),
        )
