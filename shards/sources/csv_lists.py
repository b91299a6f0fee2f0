"""Images that a list of paths names: a CSV file, or a parquet file with a column of paths."""

import csv
import io
import posixpath
from collections.abc import Iterator
from typing import Any

from shards.errors import UsageError
from shards.sources.addresses import whole_address
from shards.sources.class_labels import as_numbers, chosen_column, class_of, column_text, folded
from shards.sources.found import Found, FoundImage, SourceOptions, some
from shards.sources.roots import SourceRoots
from shards.storage.location import Location, as_location, file_size, object_sizes
from shards.storage.remote_path import is_url

PATH_COLUMNS = ("path", "file_name", "image_path", "file", "filename", "filepath", "image", "uri")
_DELIMITERS = ",;\t"


def find_in_csv(path: Location, options: SourceOptions) -> Found:
    """Return every line of a CSV file with a header: a column of paths and, if there is one, a column of labels.

    Values may be separated by commas, semicolons or tabs; spaces around them do not count.

    Raises:
        UsageError: If it is not CSV in UTF-8, there is no column of paths, or a file is not there.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
        first = text.partition("\n")[0]
        delimiter = max(_DELIMITERS, key=first.count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        lines = [(reader.line_num, [value.strip() for value in values]) for values in reader if values]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} must be CSV in UTF-8, got {error}; save it as that") from error
    if not lines:
        raise UsageError(
            f"{path} is empty; a list of images has a header such as path,label and a line an image"
        )
    header = lines[0][1]
    for number, values in lines[1:]:
        if len(values) != len(header):
            raise UsageError(
                f"every line of {path} must have the {len(header)} values of its header, line {number} has "
                f"{len(values)}; "
                "put values with commas into quotes"
            )
    rows = [(number, dict(zip(header, values, strict=True))) for number, values in lines[1:]]
    return find_listed(path, header, rows, options)


def find_listed(
    table: Location, names: list[str], rows: list[tuple[int, dict[str, Any]]], options: SourceOptions
) -> Found:
    """Return the images that the rows of a table name, each with its number for messages.

    Raises:
        UsageError: If there is no column of paths, a file is not there, or one image has two classes.
    """
    columns = [name for name in names if folded(name) in PATH_COLUMNS]
    if not columns:
        raise UsageError(
            f"{table} must have a header with a column of paths ({', '.join(PATH_COLUMNS)}), its columns "
            f"are {some(names, 20)}"
        )
    path_column = min(columns, key=lambda name: PATH_COLUMNS.index(folded(name)))
    label_column = chosen_column([name for name in names if name != path_column], options, str(table))
    labels: list[str | None] = [None] * len(rows)
    if label_column is not None:
        labels = as_numbers(
            [class_of(row.get(label_column), options, f"line {n} of {table}") for n, row in rows]
        )
    images = list(_images(table, path_column, rows, labels, options))
    _require_one_class(table, images)
    instead = f"columns are {some(names, 20)}; name one with --label-column"
    source = None if label_column is None else column_text(label_column, names)
    return Found(images, classes_from=source, instead=instead)


def _images(
    table: Location,
    column: str,
    rows: list[tuple[int, dict[str, Any]]],
    labels: list[str | None],
    options: SourceOptions,
) -> Iterator[FoundImage]:
    roots = SourceRoots.of_table(table, options)
    named = {
        name for _, row in rows if isinstance(name := row.get(column), str) and name and not is_url(name)
    }
    held = [name for name in named if roots.hold(whole_address(table.parent / name))]
    sizes = object_sizes(table.parent, held)
    for (number, row), label in zip(rows, labels, strict=True):
        name = row.get(column)
        if not isinstance(name, str) or not name:
            raise UsageError(
                f"line {number} of {table} has no path in column {column}; remove it or fill it in"
            )
        # An absolute name stays as it is.
        path = as_location(name) if is_url(name) else table.parent / name
        address = whole_address(path)
        if not roots.hold(address):
            # Whoever reads it says why it is unusable, and what allows it.
            yield FoundImage(name, label, address, 0, 0)
            continue
        if name not in sizes and not (is_url(name) and path.is_file()):
            hint = "; paths are written with /" if "\\" in name else ""
            what = "it is no file" if _is_there(path) else "no such file"
            raise UsageError(
                f"every path in {table} must be a file, line {number} names {name:.200}: {what}{hint}"
            )
        nbytes = sizes[name] if name in sizes else file_size(path)
        yield FoundImage(name, label, address, 0, nbytes)


def _is_there(path: Location) -> bool:
    try:
        return path.exists()
    except OSError:  # a name longer than any file has
        return False


def _require_one_class(table: Location, images: list[FoundImage]) -> None:
    classes: dict[str, str] = {}
    for image in images:
        name = posixpath.normpath(image.uri)
        if image.class_name and classes.setdefault(name, image.class_name) != image.class_name:
            raise UsageError(
                f"an image must have one class, {table} gives {image.key} both {classes[name]} and "
                f"{image.class_name}; "
                "leave one line"
            )
