"""Finding every image of a source, in an order that is the same on every machine."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.sources.labels import LabelTable
from shards.errors import UsageError
from shards.plan import NO_LABEL, SourceRecord

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
        source: Folder of images.
        labels: Class names and ids to use; by default the sorted class names of the source are numbered.

    Raises:
        UsageError: If there is no such source, it holds no images, or a class is not in `labels`.
    """
    from pipeline.sources.folder import find_in_folder

    path = Path(source).expanduser()
    if not path.exists():
        raise UsageError(
            f"SOURCE must be an image folder, got {source}: it does not exist; give SOURCE, "
            "or set IMAGENET to a folder with one sub-folder for each class"
        )
    if not path.is_dir():
        raise UsageError(f"SOURCE must be an image folder, got the file {source}")
    found = sorted(find_in_folder(path), key=lambda image: image.key)
    if not found:
        some = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UsageError(f"SOURCE must hold images ({some}), found none in {source}")
    return number_classes(unique_keys(found), labels)


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
    """Turns class names into label numbers: those of `labels`, else the places of the sorted names."""
    names = sorted({image.class_name for image in found if image.class_name is not None})
    table = labels or LabelTable.of_names(names)
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
