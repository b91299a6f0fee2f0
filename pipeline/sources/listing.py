"""Every image of a source with its label."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pipeline.console import log
from pipeline.sources.labels import LabelTable
from shards import (
    NO_LABEL,
    ArchiveIdentity,
    FoundImage,
    Plan,
    SourceOptions,
    SourceRecord,
    UsageError,
    find_images,
)

_AS_IT_IS = SourceOptions()


@dataclass(frozen=True)
class Listing:
    """All images of a source.

    Attributes:
        records: One for each image, sorted by key; keys are unique.
        class_names: Name of each label; empty where the source has no classes.
        archives: What each tar and parquet file was when it was listed, by address.
        roots: Folders, files and URLs at or below which the images are.
    """

    records: list[SourceRecord]
    class_names: tuple[str, ...]
    archives: Mapping[str, ArchiveIdentity] = field(default_factory=dict)
    roots: tuple[str, ...] = ()


def list_source(
    source: str,
    labels: LabelTable | None = None,
    options: SourceOptions = _AS_IT_IS,
    *,
    known: Plan | None = None,
    kept: Sequence[str] = (),
    tell: Callable[[str], object] = log,
) -> Listing:
    """List a source of any kind, and print what was found in it and what was left out.

    Args:
        source: An image folder; a tar of tars; a webdataset tar, or a folder or pattern of them; a parquet file, or a
            folder or pattern of them; a CSV file.
        labels: Class names and ids to use instead of the source's own.
        options: What to take where a source can be read in several ways.
        known: A plan of the same source; see `shards.find_images`.
        kept: Class names that keep their labels; further ones get the next numbers, unless `labels` gives them some.
        tell: Takes lines about what was found and what was left out.

    Raises:
        UsageError: If there is no such source, it holds no images, or a class is not in `labels`.
    """
    found = find_images(source, options, known)
    for line in found.summary():
        tell(line)
    own_names = LabelTable.of_names(found.class_names) if found.class_names else None
    if kept and labels is None:
        named = sorted({image.class_name for image in found.images if image.class_name is not None})
        before = LabelTable.of_names(kept)
        further = [name for name in found.class_names or named if before.id_of(name) is None]
        own_names = LabelTable.of_names([*kept, *further])
    listing = number_classes(found.images, labels or own_names)
    return replace(listing, archives=found.archives, roots=found.roots)


def number_classes(found: list[FoundImage], labels: LabelTable | None) -> Listing:
    """Turn class names into label numbers: those of `labels`, else the source's own."""
    names = sorted({image.class_name for image in found if image.class_name is not None})
    table = labels or LabelTable.of_source(names)
    ids = {name: table.id_of(name) for name in names}
    unknown = [name for name in names if ids[name] is None]
    if unknown:
        raise UsageError(
            f"every class of the source must be in --labels; {len(unknown)} are not, such as {unknown[0]!r}; "
            "add them at the end of that file"
        )
    known = {name: label for name, label in ids.items() if label is not None}
    records = [
        SourceRecord(
            key=image.key,
            label=NO_LABEL if image.class_name is None else known[image.class_name],
            uri=image.uri,
            offset=image.offset,
            nbytes=image.nbytes,
        )
        for image in found
    ]
    return Listing(records, table.class_names if names else ())
