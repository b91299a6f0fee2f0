"""Images inside parquet files, HuggingFace style (a struct with `bytes`) or as a plain binary column."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

from shards.errors import SourceDamagedError, UsageError
from shards.metadata.archives import ArchiveIdentity
from shards.metadata.plan import Plan
from shards.sources.addresses import whole_address
from shards.sources.archives import RowsDigest, identity_now, open_source_seekable
from shards.sources.class_labels import (
    LABEL_COLUMNS,
    as_numbers,
    chosen_column,
    class_of,
    column_text,
    folded,
)
from shards.sources.csv_lists import PATH_COLUMNS, find_listed
from shards.sources.folder import begins_like_an_image
from shards.sources.found import Found, FoundImage, SourceOptions, some
from shards.sources.parquet_bounds import bounded_batches
from shards.sources.roots import SourceRoots
from shards.storage.location import Location, file_size

_BINARY_COLUMNS = (
    "image",
    "img",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "bytes",
    "image_bytes",
    "content",
    "data",
    "picture",
)
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class ImageColumn:
    """The column of a parquet file that holds image files.

    Attributes:
        name: Its name.
        is_struct: Whether each is a struct with `bytes`, and perhaps `path`.
    """

    name: str
    is_struct: bool

    @property
    def columns(self) -> list[str]:
        """What to ask of a reader; parts that are not there are ignored."""
        return [f"{self.name}.bytes", f"{self.name}.path"] if self.is_struct else [self.name]

    def content(self, column: Any) -> Any:
        """Return the bytes of some rows of the column, as an array of pyarrow's large binary."""
        import pyarrow as pa
        import pyarrow.compute as pc

        values = pc.struct_field(column, "bytes") if self.is_struct else column
        return values if values.type in (pa.binary(), pa.large_binary()) else values.cast(pa.large_binary())

    def paths(self, column: Any) -> list[str | None]:
        """Return the paths of some rows of the column, None where a row has none."""
        import pyarrow.compute as pc

        if not self.is_struct or "path" not in {part.name for part in column.type}:
            return [None] * len(column)
        names = pc.struct_field(column, "path").to_pylist()
        return [name if isinstance(name, str) and name else None for name in names]


@dataclass(frozen=True)
class KnownRows:
    """What an earlier listing has found in a parquet file.

    Attributes:
        identity: What the file was then.
        sizes: Bytes of the image in each row that held one, by number of the row.
    """

    identity: ArchiveIdentity
    sizes: dict[int, int]

    @classmethod
    def of_plan(cls, plan: Plan) -> dict[str, Self]:
        """Return the rows of each parquet file of a plan, by address."""
        known = {uri: cls(archive, {}) for uri, archive in plan.archives.items() if archive.rows}
        if known:
            columns = (plan.table[name].to_pylist() for name in ("uri", "offset", "nbytes"))
            for uri, offset, nbytes in zip(*columns, strict=True):
                if uri in known:
                    known[uri].sizes[offset] = nbytes
        return known


def find_in_parquet(
    paths: Sequence[Location], options: SourceOptions, known: Mapping[str, KnownRows] = MappingProxyType({})
) -> Found:
    """Return every row of parquet files that hold images, or paths of images.

    For images inside, the offset is the number of the row in its file; a row without bytes is the file that its `path`
    names, if that is there. Numbers in the label column stay the class names here; HuggingFace's features say what they
    mean.

    Args:
        paths: The files.
        options: What to take.
        known: What an earlier listing has found, by address: of a file that is untouched since no image is read.

    Raises:
        UsageError: If a file is damaged, has no column of images or paths, or several that could be it, or
        files differ in
            the names of their classes.
    """
    parts = []
    for path in paths:
        with undamaged(path):
            parts.append(_File(path, options, known.get(whole_address(path))).find())
    names = {part.class_names for part in parts}
    if len(names) > 1:
        raise UsageError(
            f"parquet files of one source must name the same classes, {paths[0]} and others differ; encode "
            "them apart and "
            "merge the stores"
        )
    images = [image for part in parts for image in part.images]
    sources = sorted({part.classes_from for part in parts if part.classes_from is not None})
    return Found(
        images,
        class_names=names.pop(),
        classes_from=" and ".join(sources) or None,
        instead=parts[0].instead,
        archives={uri: identity for part in parts for uri, identity in part.archives.items()},
    )


class _File:
    """One parquet file that is being listed."""

    def __init__(self, path: Location, options: SourceOptions, known: KnownRows | None) -> None:
        self._path = path
        self._known = known
        self._options = options
        self._file = open_parquet(path)

    def find(self) -> Found:
        names = list(self._file.schema_arrow.names)
        column = image_column(self._file, self._path, self._options.image_column)
        if column is None:
            return find_listed(self._path, names, self._listed(names), self._options)
        others = [name for name in names if name != column.name]
        label = chosen_column(others, self._options, str(self._path))
        class_names = self._class_names(label)
        identity = identity_now(self._path)
        images: list[FoundImage] | None = None
        known = self._known
        if known is not None and known.identity.same_file(identity) and known.identity.column == column.name:
            images, digest = self._known_images(known, label), known.identity.rows
        if images is None:
            read = RowsDigest()
            images = list(self._images(column, label, read))
            digest = read.hex()
        if class_names:
            self._require_named(images, class_names)
        uri = whole_address(self._path)
        return Found(
            images,
            class_names=class_names,
            classes_from=None if label is None else column_text(label, names),
            instead=f"columns are {some(names, 20)}; name one with --label-column",
            archives={uri: ArchiveIdentity(identity.nbytes, identity.modified, digest, column.name)},
        )

    def _listed(self, names: list[str]) -> list[tuple[int, dict[str, Any]]]:
        """Return the numbered rows of a list of paths: columns that may be path or label, no byte of others."""
        of_use = (*PATH_COLUMNS, *LABEL_COLUMNS)
        wanted = [name for name in names if folded(name) in of_use or name == self._options.label_column]
        if not wanted:
            return [(number, {}) for number in range(1, self._file.metadata.num_rows + 1)]
        rows = (row for batch in batches(self._path, self._file, wanted, None) for row in batch.to_pylist())
        return list(enumerate(rows, start=1))

    def _known_images(self, known: KnownRows, label: str | None) -> list[FoundImage] | None:
        """Return the rows as they were found before, with the file's labels; None if some are not known."""
        count = self._file.metadata.num_rows
        if known.sizes.keys() != set(range(count)):
            return None  # rows without bytes, whose files beside the table may have come or gone
        classes: list[str | None] = [None] * count
        if label is not None:
            where = f"column {label} of {self._path}"
            values = (
                value
                for batch in batches(self._path, self._file, [label], None)
                for value in batch.column(label).to_pylist()
            )
            classes = as_numbers([class_of(value, self._options, where) for value in values])
        uri, stem = whole_address(self._path), self._path.stem
        return [
            FoundImage(f"{stem}/{number:09d}", name, uri, number, known.sizes[number])
            for number, name in enumerate(classes)
        ]

    def _images(self, column: ImageColumn, label: str | None, digest: RowsDigest) -> Iterator[FoundImage]:
        roots = SourceRoots.of_table(self._path, self._options)
        uri = whole_address(self._path)
        sizes: list[int] = []
        places: list[Location | None] = []
        classes: list[str | None] = []
        where = f"column {label} of {self._path}"
        for batch in batches(self._path, self._file, [*column.columns, *([label] if label else [])]):
            content = column.content(batch.column(column.name))
            names = column.paths(batch.column(column.name))
            for value, name in zip(content, names, strict=True):
                held = value.as_buffer() if value.is_valid else None
                digest.add(held)
                sizes.append(0 if held is None else held.size)
                places.append(self._file_beside(name, roots) if held is None and name else None)
            values = batch.column(label).to_pylist() if label else [None] * len(batch)
            classes += [class_of(value, self._options, where) for value in values]
        classes = as_numbers(classes)
        for number, (size, place, name) in enumerate(zip(sizes, places, classes, strict=True)):
            key = f"{self._path.stem}/{number:09d}"
            if place is None:
                yield FoundImage(key, name, uri, number, size)
            else:
                yield FoundImage(key, name, whole_address(place), 0, file_size(place))

    def _file_beside(self, name: str, roots: SourceRoots) -> Location | None:
        """Return the file that the `path` of a row without bytes names from the table's folder, if it is there."""
        path = self._path.parent / name
        return path if roots.hold(whole_address(path)) and path.is_file() else None

    def _class_names(self, label: str | None) -> tuple[str, ...]:
        """Return the names of the numbers in the label column, where HuggingFace datasets left them; else nothing.

        Source: `datasets` writes its features as JSON under the schema's metadata key `huggingface`.
        """
        schema = self._file.schema_arrow
        try:
            features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
            names = features[label]["names"]
        except (KeyError, TypeError, ValueError, RecursionError):
            return ()
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            return ()
        return tuple(f"{number} {name}" for number, name in enumerate(names))

    def _require_named(self, images: list[FoundImage], class_names: tuple[str, ...]) -> None:
        numbers = {str(number) for number in range(len(class_names))}
        for image in images:
            if image.class_name is not None and image.class_name not in numbers:
                raise UsageError(
                    f"labels must be numbers of the {len(class_names)} classes that {self._path} names, row "
                    f"{image.offset} has {image.class_name}; correct the file's features or its labels"
                )


def image_column(file: Any, path: Location, asked: str | None = None) -> ImageColumn | None:
    """Return the column of a parquet file that holds images, if there is one.

    Raises:
        UsageError: If several could be it, or the one asked for cannot.
    """
    schema = file.schema_arrow
    structs = [str(field.name) for field in schema if _holds_bytes(field.type)]
    plain = [str(field.name) for field in schema if _is_binary(field.type)]
    if asked is not None:
        if asked not in (*structs, *plain):
            raise UsageError(
                f"--image-column must be a column of images of {path}, {asked!r} is not; such columns are "
                f"{some([*structs, *plain], 20) or 'none'}"
            )
        return ImageColumn(asked, asked in structs)
    found = structs or [
        name for name in plain if folded(name) in _BINARY_COLUMNS or _begins(path, file, name)
    ]
    if len(found) > 1:
        raise UsageError(f"{path} has several columns of images: {some(found)}; name one with --image-column")
    lists = [str(field.name) for field in schema if _is_list_of_images(field.type)]
    if not found and lists:
        raise UsageError(
            f"a row of a parquet file must have one image, column {lists[0]} of {path} holds lists of "
            "images; write a row "
            "for each"
        )
    return ImageColumn(found[0], bool(structs)) if found else None


def first_image_column(file: Any) -> ImageColumn | None:
    """Return the first struct with `bytes`, if there is one."""
    names = (str(field.name) for field in file.schema_arrow if _holds_bytes(field.type))
    return next((ImageColumn(name, is_struct=True) for name in names), None)


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_struct(kind)) and any(
        part.name == "bytes" and _is_binary(part.type) for part in kind
    )


def _is_binary(kind: Any) -> bool:
    import pyarrow as pa

    return bool(
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or str(kind) in ("binary_view", "null")
    ) and not pa.types.is_null(kind)


def _is_list_of_images(kind: Any) -> bool:
    import pyarrow as pa

    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    return _holds_bytes(kind.value_type) or _is_binary(kind.value_type)


def _begins(path: Location, file: Any, name: str) -> bool:
    """Return whether the first value of a binary column begins like an image."""
    first = next(batches(path, file, [name], 1), None)
    value = None if first is None or not len(first) else first.column(0)[0].as_py()
    return value is not None and begins_like_an_image(value[:16])


def batches(path: Location, file: Any, columns: list[str], rows: int | None = _ROWS_AT_ONCE) -> Iterator[Any]:
    """Yield some columns of a parquet file in order, at most `rows` rows at a time; see `bounded_batches`."""
    for group in range(file.num_row_groups):
        yield from bounded_batches(path, file, group, columns, rows)


def open_parquet(path: Location, metadata: Any = None) -> Any:
    """Open a parquet file at any location, of which only the parts that are needed are read; a known footer is not.

    Raises:
        UsageError: If it is no parquet file, or damaged.
    """
    import pyarrow.parquet as pq

    file = open_source_seekable(path)
    with undamaged(path):
        return pq.ParquetFile(file, metadata=metadata, pre_buffer=False)


@contextmanager
def undamaged(path: Location) -> Iterator[None]:
    """Turn pyarrow's error about a damaged parquet file into one line for its user."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        # Of a damaged page or footer pyarrow says OSError without a number; those of a device have one.
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise
        reason = " ".join(str(error).split())
        raise SourceDamagedError(
            f"{path} is not a readable parquet file ({reason}); download it again"
        ) from error
