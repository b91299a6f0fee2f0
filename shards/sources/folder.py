"""Images in a folder: class sub-folders, or no classes at all."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from shards.errors import UsageError
from shards.sources.addresses import address_of, printable
from shards.sources.found import IMAGE_SUFFIXES, Found, FoundImage, LeftOut, is_hidden, some, suffix_of
from shards.storage.location import Location, storage_of
from shards.storage.walk import WalkedEntry

_File = tuple[str, tuple[str, ...], int]  # address, path below the folder, bytes

NO_IMAGES = frozenset(
    (
        ".txt", ".json", ".jsonl", ".xml", ".csv", ".tsv", ".md", ".html", ".htm", ".yaml", ".yml", ".ini", ".log",
        ".py", ".sh", ".npy", ".npz", ".mat", ".h5", ".hdf5", ".pkl", ".pt", ".pth", ".safetensors", ".parquet",
        ".arrow", ".db", ".tar", ".gz", ".tgz", ".zip", ".zst", ".7z", ".mp4", ".mp3", ".wav", ".avi", ".mov", ".pdf",
        ".svg", ".cls", ".tmp", ".part", ".lock",
    )
)  # fmt: skip
"""Endings of files that are not looked into for whether they are images."""


@dataclass
class FolderListing:
    """Lists a folder, and counts what it leaves out."""

    left_out: LeftOut = field(default_factory=LeftOut)
    _class_folders: set[str] = field(default_factory=set)

    def find(self, root: Location) -> Found:
        """Find every image file below `root`; its class is the first folder of its path below `root`, if there is one.

        Names that begin with a dot are left out. Links are followed, but not to a folder that they are in. A link that
        leads to no file is listed with 0 bytes, so that it counts as an image that is missing.

        Raises:
            UsageError: If some images are in class folders and some beside them.
        """
        images = []
        loose = classed = None
        for address, parts, nbytes in self.files(root):
            name = "/".join(parts)
            if len(parts) == 1:
                loose = loose or name
            else:
                classed = classed or name
            if loose and classed:
                raise UsageError(
                    "images must be either all in class sub-folders or all in the folder itself, "
                    f"got {printable(loose)} beside {printable(classed)}; move or remove one kind"
                )
            class_name = printable(parts[0]) if len(parts) > 1 else None
            images.append(FoundImage(printable(name), class_name, address, 0, nbytes))
        source = "the first folder of each path" if classed else None
        notes = self._empty_classes(images) if classed else ()
        return Found(images, classes_from=source, instead="images are in the folder itself", notes=notes)

    def files(self, root: Location) -> Iterator[_File]:
        """Yield address, path below the folder and bytes of every image file."""
        for entry in storage_of(root).walk(root):
            name = entry.parts[-1]
            if is_hidden("/".join(entry.parts)):
                self.left_out.hidden += 1
            elif entry.is_folder:
                self.left_out.outside += entry.is_outside
                if len(entry.parts) == 1:
                    self._class_folders.add(printable(name))
            elif not _is_image(entry):
                self.left_out.endings[suffix_of(printable(name))] += 1
            else:
                self.left_out.outside += entry.is_outside
                nbytes = entry.size()
                if nbytes is None:
                    self.left_out.special += 1
                else:
                    yield address_of(entry.path), entry.parts, nbytes

    def _empty_classes(self, images: list[FoundImage]) -> tuple[str, ...]:
        empty = sorted(self._class_folders - {image.class_name for image in images})
        return (f"folders without images, which are no classes: {some(empty)}",) if empty else ()


def _is_image(entry: WalkedEntry) -> bool:
    """Return whether a file counts as an image: by its ending, and where that says nothing by its first bytes."""
    suffix = suffix_of(entry.parts[-1])
    if suffix in IMAGE_SUFFIXES:
        return True
    return suffix not in NO_IMAGES and begins_like_an_image(entry.head(16))


def begins_like_an_image(head: bytes) -> bool:
    """Return whether the first 16 bytes of a file are those of a JPEG, PNG, GIF, WebP, TIFF, JPEG 2000 or AVIF file."""
    begins = (
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"GIF8",
        b"II*\0",
        b"MM\0*",
        b"\0\0\0\x0cjP  \r\n",
        b"\xff\x4f\xff\x51",
    )
    return (
        head.startswith(begins)
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or head[4:12] in (b"ftypavif", b"ftypavis")
    )
