"""Images in a folder: class sub-folders, or no classes at all."""

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from shards.errors import UsageError
from shards.sources.addresses import address_of, printable
from shards.sources.archives import NotAFileError, open_regular
from shards.sources.found import IMAGE_SUFFIXES, Found, FoundImage, LeftOut, is_hidden, some, suffix_of
from shards.storage.location import Location
from shards.storage.remote_path import RemotePath

_LEADS_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES)
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

    def find(self, root: Location) -> Found:
        """Every image file below `root`; its class is the first folder of its path below `root`, if there is one.

        Names that begin with a dot are left out. Links are followed, but not to a folder that they lie in. A link that
        leads to no file is listed with 0 bytes, so that it counts as an image that is missing.

        Raises:
            UsageError: If some images lie in class folders and some beside them.
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
                    "images must lie either all in class sub-folders or all in the folder itself, "
                    f"got {printable(loose)} beside {printable(classed)}; move or remove one kind"
                )
            class_name = printable(parts[0]) if len(parts) > 1 else None
            images.append(FoundImage(printable(name), class_name, address, 0, nbytes))
        source = "the first folder of each path" if classed else None
        notes = self._empty_classes(root, images) if classed else ()
        return Found(images, classes_from=source, instead="images lie in the folder itself", notes=notes)

    def files(self, root: Location) -> Iterator[_File]:
        """Address, path below the folder and bytes of every image file."""
        return self._remote_files(root) if isinstance(root, RemotePath) else self._local_files(root)

    def _empty_classes(self, root: Location, images: list[FoundImage]) -> tuple[str, ...]:
        if isinstance(root, RemotePath):
            return ()  # a server has no empty folders
        classes = {image.class_name for image in images}
        with os.scandir(root) as entries:
            empty = sorted(
                name
                for entry in entries
                if not entry.name.startswith(".")
                and (name := printable(entry.name)) not in classes
                and _is_folder(entry)
            )
        return (f"folders without images, which are no classes: {some(empty)}",) if empty else ()

    def _local_files(self, root: Path) -> Iterator[_File]:
        top = str(root.absolute())
        inside = os.path.realpath(top)
        for entry, parts in self._entries(top, (), inside):
            nbytes = self._size_of(entry)
            if nbytes is not None:
                yield address_of(entry.path), parts, nbytes

    def _size_of(self, entry: "os.DirEntry[str]") -> int | None:
        """Bytes of an image file; 0 of a link that leads nowhere, None of what is no file."""
        try:
            status = entry.stat()
        except OSError as error:
            if error.errno in _LEADS_NOWHERE and entry.is_symlink():
                return 0
            raise
        if not stat.S_ISREG(status.st_mode):
            self.left_out.special += 1
            return None
        return status.st_size

    def _remote_files(self, root: RemotePath) -> Iterator[_File]:
        for name, nbytes in sorted(root.object_sizes().items(), key=lambda item: item[0].split("/")):
            if is_hidden(name):
                self.left_out.hidden += 1
            elif suffix_of(name) in IMAGE_SUFFIXES:
                yield str(root / name), tuple(name.split("/")), nbytes
            else:
                self.left_out.endings[suffix_of(name)] += 1

    def _entries(
        self,
        folder: str,
        above: tuple[str, ...],
        root: str,
        outer: frozenset[tuple[int, int]] = frozenset(),
    ) -> Iterator[tuple["os.DirEntry[str]", tuple[str, ...]]]:
        """Yield the image files below a folder, sorted; `outer` has the device and inode of the folders it lies in."""
        inside = outer | {_identity(folder)}
        with os.scandir(folder) as entries:
            listing = sorted(entries, key=lambda entry: entry.name)
        for entry in listing:
            if entry.name.startswith("."):
                self.left_out.hidden += 1
                continue
            is_folder = _is_folder(entry)
            if is_folder and entry.is_symlink() and _identity(entry.path) in inside:
                continue
            if is_folder or _is_image(entry):
                if entry.is_symlink() and not _lies_in(os.path.realpath(entry.path), root):
                    self.left_out.outside += 1
                if is_folder:
                    yield from self._entries(entry.path, (*above, entry.name), root, inside)
                else:
                    yield entry, (*above, entry.name)
            else:
                self.left_out.endings[suffix_of(printable(entry.name))] += 1


def _lies_in(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


def _is_image(entry: "os.DirEntry[str]") -> bool:
    """Whether a file counts as an image: by its ending, and where that says nothing by its first bytes."""
    suffix = suffix_of(entry.name)
    if suffix in IMAGE_SUFFIXES:
        return True
    if suffix in NO_IMAGES:
        return False
    try:
        descriptor = open_regular(Path(entry.path))
    except (NotAFileError, OSError):
        return False
    try:
        return begins_like_an_image(os.read(descriptor, 16))
    except OSError:
        return False
    finally:
        os.close(descriptor)


def begins_like_an_image(head: bytes) -> bool:
    """Whether the first 16 bytes of a file are those of a JPEG, PNG, GIF, WebP, TIFF, JPEG 2000 or AVIF file."""
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


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno in _LEADS_NOWHERE:
            return False
        raise


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)  # noqa: PTH116 - paths here are text
    return status.st_dev, status.st_ino
