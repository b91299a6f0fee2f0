"""Finding every image of a source, in an order that is the same on every machine."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from pipeline.sources.labels import LabelTable
from shards.errors import UsageError
from shards.metadata.plan import NO_LABEL, SourceRecord
from shards.storage.location import Location, as_location

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
)
"""File name endings, in lower case, that count as images."""


@dataclass(frozen=True)
class FoundImage:
    """One image as a source names it, before class names have become numbers."""

    key: str
    class_name: str | None
    uri: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Listing:
    """All images of a source.

    Attributes:
        records: One for each image, sorted by key; keys are unique.
        class_names: Name of each label; empty where the source has no classes.
    """

    records: list[SourceRecord]
    class_names: tuple[str, ...]


def list_source(source: str, labels: LabelTable | None = None) -> Listing:
    """Lists a source of any kind.

    Args:
        source: An image folder; a tar of tars; a webdataset tar, or a folder or pattern of them; a parquet file, or a
            folder or pattern of them; a CSV file.
        labels: Class names and ids to use instead of the source's own.

    Raises:
        UsageError: If there is no such source, it holds no images, or a class is not in `labels`.
    """
    found, own_names = _find(source)
    images = sorted(found, key=lambda image: (image.key, image.uri, image.offset))
    if not images:
        some = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UsageError(f"SOURCE must hold images ({some}), found none in {source}")
    return number_classes(
        unique_keys(images), labels or (LabelTable.of_names(own_names) if own_names else None)
    )


def _find(source: str) -> tuple[Iterable[FoundImage], tuple[str, ...]]:
    """The images of a source, and its own class names in the order of their ids, where it states them."""
    from shards.sources.folder import find_in_folder
    from shards.sources.tables import class_names_in, find_in_csv, find_in_parquet
    from shards.sources.tars import find_in_tar_of_tars, is_tar_of_tars
    from shards.sources.webdataset import find_in_webdataset

    paths = _files_of(source)
    if paths is None:
        return find_in_folder(as_location(source)), ()
    suffixes = {path.suffix.lower() for path in paths}
    if suffixes == {".tar"}:
        if len(paths) == 1 and is_tar_of_tars(paths[0]):
            return find_in_tar_of_tars(paths[0]), ()
        return find_in_webdataset(paths), ()
    if suffixes == {".parquet"}:
        return find_in_parquet(paths), class_names_in(paths[0])
    if suffixes == {".csv"} and len(paths) == 1:
        return find_in_csv(paths[0]), ()
    raise UsageError(
        "SOURCE must be an image folder, or tar, parquet or one csv file, "
        f"got {source} ({', '.join(sorted(suffixes)) or 'nothing'})"
    )


def _files_of(source: str) -> list[Location] | None:
    """The table or tar files that `source` stands for, or None if it is a folder of images."""
    path = as_location(source)
    if any(character in source for character in "*?[") and not path.exists():
        return sorted(path.parent.glob(path.name), key=_by_path)
    if path.is_file():
        return [path]
    if path.is_dir():
        for pattern in ("*.tar", "*.parquet"):
            files: list[Location] = sorted(path.glob(pattern), key=_by_path)
            if files:
                return files
        return None
    raise UsageError(
        f"SOURCE must be an image folder, tar, parquet or csv file, got {source}: it does not exist; give SOURCE, "
        "or set IMAGENET to a folder with one sub-folder for each class"
    )


def _by_path(path: Location) -> tuple[str, ...]:
    return tuple(str(path).split("/"))


def unique_keys(found: Iterable[FoundImage]) -> list[FoundImage]:
    """The same images; the second and later ones of one key get `#2`, `#3`, … behind it, in the given order."""
    seen: Counter[str] = Counter()
    images = []
    for image in found:
        seen[image.key] += 1
        count = seen[image.key]
        images.append(image if count == 1 else replace(image, key=f"{image.key}#{count}"))
    return images


def number_classes(found: list[FoundImage], labels: LabelTable | None) -> Listing:
    """Turns class names into label numbers: those of `labels`, else the source's own."""
    names = sorted({image.class_name for image in found if image.class_name is not None})
    table = labels or LabelTable.of_source(names)
    unknown = [name for name in names if name not in table.ids]
    if unknown:
        raise UsageError(
            f"every class of the source must be in --labels; {len(unknown)} are not, such as {unknown[0]!r}; "
            "add them at the end of that file"
        )
    records = [
        SourceRecord(
            key=image.key,
            label=NO_LABEL if image.class_name is None else table.ids[image.class_name],
            uri=image.uri,
            offset=image.offset,
            nbytes=image.nbytes,
        )
        for image in found
    ]
    return Listing(records, table.class_names if names else ())
