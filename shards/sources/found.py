"""What finding images in a source gives: one entry an image, before class names have become numbers."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal

from shards.metadata.archives import ArchiveIdentity
from shards.sources.tar_headers import Part

IMAGE_SUFFIXES = frozenset(
    (
        ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
        ".jp2", ".j2k", ".avif",
    )
)  # fmt: skip
"""File name endings, in lower case, that count as images."""

SourceKind = Literal["images", "tar", "parquet", "csv"]
"""What `--source-kind` takes: image files, or archives and tables by the ending of their files."""


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What to take of a source that can be read in several ways.

    Attributes:
        kind: Files of one kind, where several are side by side.
        split: One of the splits that are side by side, such as `train`.
        label_column: The column of a table, or key of `.json` files, that says the class.
        first_label: Of a list of labels, take the first.
        image_column: The column of a parquet file that holds the images.
        take_readable: Take what can be read of damaged tars.
        roots: Further places that tables may name files in.
    """

    kind: SourceKind | None = None
    split: str | None = None
    label_column: str | None = None
    first_label: bool = False
    image_column: str | None = None
    take_readable: bool = False
    roots: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FoundImage:
    """One image as a source names it.

    Attributes:
        key: Its name, unique in the source once `shards.sources.find.unique_keys` has seen it.
        class_name: Its class as the source writes it; None for none.
        uri: The file or archive it is in.
        offset: Its first byte in a tar, its row in a parquet file, else 0.
        nbytes: Its size in bytes.
        parts: Of a sparse file in a tar, its pieces.
        problem: Why it cannot be used, where that is known already.
    """

    key: str
    class_name: str | None
    uri: str
    offset: int
    nbytes: int
    parts: tuple[Part, ...] | None = None
    problem: str | None = None


@dataclass
class LeftOut:
    """What a listing has passed over, for the lines that say so.

    Attributes:
        endings: Number of files by ending, in lower case; "" for none.
        hidden: Files and folders whose name begins with a dot, and what is in such folders of a tar.
        special: Pipes, sockets and devices.
        outside: Links that lead out of the source; they are followed.
    """

    endings: Counter[str] = field(default_factory=Counter)
    hidden: int = 0
    special: int = 0
    outside: int = 0

    def lines(self) -> list[str]:
        """Return one line for all of them, or none."""
        parts = []
        if self.endings:
            kinds = ", ".join(f"{ending or 'no ending'} {n}" for ending, n in self.endings.most_common(12))
            parts.append(f"{sum(self.endings.values())} files that are no images by their endings ({kinds})")
        if self.hidden:
            parts.append(f"{self.hidden} names that begin with a dot")
        if self.special:
            parts.append(f"{self.special} pipes, sockets or devices")
        lines = ["left out: " + "; ".join(parts)] if parts else []
        if self.outside:
            lines.append(f"{self.outside} links lead out of the source, and are followed")
        return lines


@dataclass(frozen=True)
class Found:
    """All images of a source, sorted by key.

    Attributes:
        images: One for each image; keys are unique.
        class_names: The source's own class names in the order of their ids, where it states them; else empty.
        classes_from: Where the classes come from, such as `column label`; None where there are none.
        instead: What there is where labels could have been, such as `columns are image, caption`.
        notes: Lines for the user: what was left out, and what looks odd.
        archives: What each tar and parquet file was when it was listed, by `FoundImage.uri`.
        roots: Where the images are: folders, files or URLs.
    """

    images: list[FoundImage]
    class_names: tuple[str, ...] = ()
    classes_from: str | None = None
    instead: str = ""
    notes: tuple[str, ...] = ()
    archives: Mapping[str, ArchiveIdentity] = field(default_factory=dict)
    roots: tuple[str, ...] = ()

    def summary(self) -> list[str]:
        """Return lines that say what was found and what was not: always one about classes."""
        named = len({image.class_name for image in self.images} - {None})
        without = sum(image.class_name is None for image in self.images)
        if named:
            first = f"{len(self.images)} images in {named} classes from {self.classes_from}"
            first += f"; {without} of them have none" * (without > 0)
        else:
            first = f"{len(self.images)} images, no labels" + f"; {self.instead}" * bool(self.instead)
        return [first, *self.notes]


def suffix_of(name: str) -> str:
    """Return the ending of a name in lower case."""
    return PurePosixPath(name).suffix.lower()


def is_hidden(name: str) -> bool:
    """Return whether any part of a path below the source begins with a dot; such names are left out everywhere."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def some(names: Iterable[str], at_most: int = 3) -> str:
    """Return the first few of some names, for a message."""
    listed = list(names)
    return ", ".join(listed[:at_most]) + (
        f" and {len(listed) - at_most} more" if len(listed) > at_most else ""
    )
