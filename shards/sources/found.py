"""What finding images in a source gives: one entry an image, before class names have become numbers."""

from dataclasses import dataclass

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
)
"""File name endings, in lower case, that count as images."""


@dataclass(frozen=True)
class FoundImage:
    """One image as a source names it.

    Attributes:
        key: Its name, unique in the source once `shards.sources.find.unique_keys` has seen it.
        class_name: Its class as the source writes it; None for none.
        uri: The file or archive it lies in.
        offset: Its first byte in a tar, its row in a parquet file, else 0.
        nbytes: Its size in bytes.
    """

    key: str
    class_name: str | None
    uri: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Found:
    """All images of a source, sorted by key.

    Attributes:
        images: One for each image; keys are unique.
        class_names: The source's own class names in the order of their ids, where it states them; else empty.
        notes: Lines for the user about what was left out.
    """

    images: list[FoundImage]
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
