"""Images that a table names: HuggingFace-style parquet with the bytes inside, or a list of paths."""

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from pipeline.sources.folder import whole_address
from pipeline.sources.listing import FoundImage
from shards.errors import UsageError
from shards.location import Location, as_location, file_size, object_sizes
from shards.remote.path import RemotePath, is_url

_PATH_COLUMNS = ("path", "file_name", "image_path", "file", "filename", "uri")
_LABEL_COLUMNS = ("label", "class", "cls")


def find_in_parquet(paths: list[Location]) -> Iterator[FoundImage]:
    """Every row of parquet files that hold images (`image` struct with `bytes`) or paths of images.

    For images inside, the offset is the number of the row in its file. Numbers in the label column stay the class
    names here; `class_names_in` says what they mean.

    Raises:
        UsageError: If there is no column of images or paths.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    for path in paths:
        try:
            file = open_parquet(path)
        except pa.ArrowInvalid as error:
            raise UsageError(f"{path} is not a readable parquet file ({error}); download it anew") from error
        names = file.schema_arrow.names
        column = image_column(file.schema_arrow)
        label = next((name for name in _LABEL_COLUMNS if name in names), None)
        if column is None:
            rows = file.read([name for name in names if name in (*_PATH_COLUMNS, label)]).to_pylist()
            yield from _listed(path, rows)
            continue
        number = 0
        wanted = [f"{column}.bytes", *([label] if label else [])]
        for batch in file.iter_batches(batch_size=64, columns=wanted):
            sizes = pc.binary_length(batch.column(column).field("bytes")).to_pylist()
            labels = batch.column(label).to_pylist() if label else [None] * len(sizes)
            for size, value in zip(sizes, labels, strict=True):
                key = f"{path.stem}/{number:09d}"
                class_name = None if value is None else str(value)
                yield FoundImage(key, class_name, whole_address(path), number, size or 0)
                number += 1


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
    """A parquet file at any place, of which only the parts that are asked for are read; its footer, if it is known."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(path.open("rb") if isinstance(path, RemotePath) else path, metadata=metadata)


def find_in_csv(path: Location) -> Iterator[FoundImage]:
    """Every line of a CSV file with a header: a column of paths and, if there is one, a column of labels.

    Raises:
        UsageError: If there is no column of paths, or a file is not there.
    """
    content = io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")
    yield from _listed(path, csv.DictReader(content))


def _listed(table: Location, rows: Any) -> Iterator[FoundImage]:
    sizes: dict[str, int] = {}
    rows = list(rows)
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
            class_name=None if label is None else str(label),
            uri=whole_address(path),
            offset=0,
            nbytes=sizes[name] if name in sizes else file_size(path),
        )
