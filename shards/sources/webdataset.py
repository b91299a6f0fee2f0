"""Images of webdataset tars, in which the files of one sample follow each other and share the beginning of their name.

A name reaches up to the first dot of its last path part; the rest is the ending that says what the file is.
"""

import json
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

from shards.sources.folder import whole_address
from shards.sources.found import IMAGE_SUFFIXES, FoundImage
from shards.sources.tars import Member, members
from shards.storage.location import Location, open_object

_CLASS_SUFFIXES = frozenset((".cls", ".json"))


@dataclass
class _Sample:
    """Files of one name that follow each other.

    Attributes:
        name: Their name.
        images: Those that are images, by ending.
        class_suffixes: Endings of those that may say its class.
        class_name: Its class, if one of them does.
    """

    name: str
    images: dict[str, Member] = field(default_factory=dict)
    class_suffixes: set[str] = field(default_factory=set)
    class_name: str | None = None

    def plain_image(self) -> Member | None:
        """The first image whose ending has no other part, such as `.png` but not `.seg.png`."""
        return next((member for suffix, member in self.images.items() if suffix in IMAGE_SUFFIXES), None)


def find_in_webdataset(paths: list[Location]) -> tuple[list[FoundImage], list[str]]:
    """One image of each sample of webdataset tars, and lines about the other images that the samples hold.

    Its class is in the sample's `.cls` file or the `.json` file's `label`. Where no tar holds such a file and every
    image lies in a folder, its class is the first folder of its path, as in an image folder.

    Keys are the tar's name and the sample's, so that equal samples of two tars stay apart.
    """
    found: list[FoundImage] = []
    folders: list[str | None] = []
    unused: list[str] = []
    says_classes = False
    for path in paths:
        samples = list(_samples(path))
        says_classes = says_classes or any(sample.class_suffixes for sample in samples)
        for sample, image in _images_of(samples, unused):
            key = f"{path.stem}/{sample.name}"
            found.append(FoundImage(key, sample.class_name, whole_address(path), image.offset, image.nbytes))
            folders.append(_first_folder(sample.name))
    notes = []
    if unused:
        notes = [
            f"left out {len(unused)} images such as {unused[0]}: each sample of a webdataset tar gives one image"
        ]
    if says_classes or None in folders:
        return found, notes
    return [replace(image, class_name=folder) for image, folder in zip(found, folders, strict=True)], notes


def _samples(path: Location) -> Iterator[_Sample]:
    """The samples of a tar: a name that comes again after others, or an ending that comes again, begins a new one."""
    sample: _Sample | None = None
    with open_object(path) as source:
        for member in members(path):
            name, suffix = split_sample_name(member.name)
            if name == "" or name.endswith("/"):
                continue  # a hidden file, which webdataset skips too
            if (
                sample is None
                or sample.name != name
                or suffix in sample.images
                or suffix in sample.class_suffixes
            ):
                if sample is not None:
                    yield sample
                sample = _Sample(name)
            if PurePosixPath(member.name.lower()).suffix in IMAGE_SUFFIXES:
                sample.images[suffix] = member
            elif suffix in _CLASS_SUFFIXES:
                sample.class_suffixes.add(suffix)
                if sample.class_name is None:
                    sample.class_name = _class_of(suffix, source.read(member.nbytes, member.offset))
    if sample is not None:
        yield sample


def _images_of(samples: list[_Sample], unused: list[str]) -> Iterator[tuple[_Sample, Member]]:
    """The image of each sample of a tar that has one; names of other images are added to `unused`.

    A tar may be sorted by ending, with all images before or behind all classes: a class that stands alone goes to the
    first image of its name that has none. For the same reason an image such as `a.seg.png` is one only where there is
    no `a.png` or the like in the whole tar.
    """
    plain = {sample.name for sample in samples if sample.plain_image()}
    classes: defaultdict[str, deque[str]] = defaultdict(deque)
    for sample in samples:
        if not sample.images and sample.class_name is not None:
            classes[sample.name].append(sample.class_name)
    for sample in samples:
        image = sample.plain_image()
        if image is None and sample.name not in plain:
            image = next(iter(sample.images.values()), None)
        unused.extend(other.name for other in sample.images.values() if other is not image)
        if image is None:
            continue
        if sample.class_name is None and classes.get(sample.name):
            sample.class_name = classes[sample.name].popleft()
        yield sample, image


def _first_folder(name: str) -> str | None:
    parts = [part for part in PurePosixPath(name).parts if part != "/"]
    return parts[0] if len(parts) > 1 else None


def split_sample_name(name: str) -> tuple[str, str]:
    """Sample name and whole ending of a webdataset member, in lower case: `a/1.seg.png` is (`a/1`, `.seg.png`).

    Source: webdataset 1.0 `tariterators.base_plus_ext`: the name ends at the first dot of the last path part.
    """
    folder, slash, last = name.rpartition("/")
    stem, _, endings = last.partition(".")
    return folder + slash + stem, "." + endings.lower()


def _class_of(suffix: str, content: bytes) -> str | None:
    text = content.decode("utf-8", "replace").strip()
    if suffix == ".cls":
        return text or None
    try:
        values = json.loads(text)
    except ValueError:
        return None
    label = values.get("label", values.get("cls")) if isinstance(values, dict) else None
    return None if label is None else str(label)
