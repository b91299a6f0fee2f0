"""Images of webdataset tars, in which the files of one sample follow each other and share the beginning of their name.

A name reaches up to the first dot of its last path part; the rest is the ending that says what the file is.
"""

import json
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from shards.errors import UsageError
from shards.sources.class_labels import as_numbers, chosen_column, class_of
from shards.sources.found import IMAGE_SUFFIXES, FoundImage, LeftOut, SourceOptions, some, suffix_of
from shards.sources.tar_headers import Member
from shards.storage.location import Location, open_object
from shards.storage.object_reader import ObjectReader

_LARGEST_LABEL = 1 << 10
_LARGEST_JSON = 1 << 22


@dataclass(frozen=True)
class FlatTar:
    """A tar whose images are in it directly.

    Attributes:
        path: Where it is.
        uri: Its whole address.
        files: Its files that are not hidden, in order.
    """

    path: Location
    uri: str
    files: list[Member]


@dataclass
class FoundInTars:
    """Images of flat tars.

    Attributes:
        images: One for each sample that has one.
        classes_from: What gave the classes, if anything did.
        instead: What could have given them and did not.
        notes: Lines about other images that were left out.
        only_images: Whether the tars hold nothing beside images.
        in_folders: Whether some images are in folders of their tar.
    """

    images: list[FoundImage] = field(default_factory=list)
    classes_from: str | None = None
    instead: str = ""
    notes: tuple[str, ...] = ()
    only_images: bool = True
    in_folders: bool = False


@dataclass
class _Sample:
    """Files of one name that follow each other.

    Attributes:
        name: Their name.
        images: Those that are images, by ending.
        others: Endings of those that are not.
        class_name: Its class, if one of them says it.
    """

    name: str
    images: dict[str, Member] = field(default_factory=dict)
    others: set[str] = field(default_factory=set)
    class_name: str | None = None

    def plain_image(self) -> Member | None:
        """Return the first image whose ending has no other part, such as `.png` but not `.seg.png`."""
        return next((member for suffix, member in self.images.items() if suffix in IMAGE_SUFFIXES), None)


def find_in_flat_tars(tars: list[FlatTar], options: SourceOptions, left_out: LeftOut) -> FoundInTars:
    """Return one image of each sample of webdataset tars.

    Its class is in the sample's `.cls` file or the `.json` file's label. Where no such file says one, it is the first
    folder of its path, as in an image folder. An image whose own files and path say nothing has no class.

    Keys are the tar's name and the sample's, so that equal samples of two tars stay apart.
    """
    labels = _Labels(options)
    unused: list[str] = []
    found = FoundInTars()
    folders: list[str | None] = []
    others: Counter[str] = Counter()
    for tar in tars:
        with open_object(tar.path) as source:
            samples = list(_samples(tar, source, labels))
        others.update(suffix for sample in samples for suffix in sample.others)
        for sample, image in _images_of(samples, unused):
            problem = image.problem
            key, nbytes = f"{tar.path.stem}/{sample.name}", 0 if problem else image.nbytes
            found.images.append(
                FoundImage(key, sample.class_name, tar.uri, image.offset, nbytes, image.parts, problem)
            )
            folders.append(_first_folder(sample.name))
    found.only_images, found.in_folders = not others, any(folders)
    _name_classes(found, folders, labels)
    if unused:
        found.notes = (
            f"left out {len(unused)} images such as {unused[0]}: each sample of a webdataset tar gives one "
            "image",
        )
    for suffix, count in others.items():
        if suffix not in labels.used_suffixes:
            left_out.endings[suffix] += count
    if found.classes_from is None and others:
        beside = ", ".join(f"{suffix} {count}" for suffix, count in others.most_common(8))
        found.instead = f"files beside the images are {beside}" + labels.keys_seen()
    return found


def _name_classes(found: FoundInTars, folders: list[str | None], labels: "_Labels") -> None:
    """Decide where the classes come from: files of labels if any has one, else folders."""
    names: list[str | None]
    if any(image.class_name is not None for image in found.images):
        found.classes_from = " and ".join(sorted(labels.said_by))
        names = as_numbers([image.class_name for image in found.images])
    elif any(folders):
        found.classes_from = "the first folder of each path in the tars"
        names = folders
    else:
        return
    found.images = [
        image
        if image.class_name == name
        else FoundImage(image.key, name, image.uri, image.offset, image.nbytes, image.parts, image.problem)
        for image, name in zip(found.images, names, strict=True)
    ]


def _samples(tar: FlatTar, source: ObjectReader, labels: "_Labels") -> Iterator[_Sample]:
    """Yield a tar's samples: a name that comes again after others, or an ending that comes again, begins a new one."""
    sample: _Sample | None = None
    for member in tar.files:
        if suffix_of(member.name) == ".tar":
            continue
        name, suffix = split_sample_name(member.name)
        again = sample is not None and (suffix in sample.images or suffix in sample.others)
        if sample is None or sample.name != name or again:
            if sample is not None:
                yield sample
            sample = _Sample(name)
        if suffix_of(member.name) in IMAGE_SUFFIXES:
            sample.images[suffix] = member
        else:
            sample.others.add(suffix)
            if sample.class_name is None:
                sample.class_name = labels.read(suffix, member, source, tar.path)
    if sample is not None:
        yield sample


def _images_of(samples: list[_Sample], unused: list[str]) -> Iterator[tuple[_Sample, Member]]:
    """Yield the image of each sample of a tar that has one; names of other images are added to `unused`.

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
    parts = [part for part in PurePosixPath(name).parts if part not in ("/", "..")]
    return parts[0] if len(parts) > 1 else None


def split_sample_name(name: str) -> tuple[str, str]:
    """Sample name and whole ending of a webdataset member, in lower case: `a/1.seg.png` is (`a/1`, `.seg.png`).

    Source: webdataset 1.0 `tariterators.base_plus_ext`: the name ends at the first dot of the last path part.
    """
    folder, slash, last = name.rpartition("/")
    stem, _, endings = last.partition(".")
    return folder + slash + stem, "." + endings.lower()


class _Labels:
    """Reads the classes that files of samples say.

    Attributes:
        said_by: What has said a class so far.
        used_suffixes: Endings of files that were read.
    """

    def __init__(self, options: SourceOptions) -> None:
        self.said_by: set[str] = set()
        self.used_suffixes = {".cls", ".json"}
        self._options = options
        self._keys: Counter[str] = Counter()

    def read(self, suffix: str, member: Member, source: ObjectReader, tar: Location) -> str | None:
        """Return the class that one file says, if it says one.

        Raises:
            UsageError: If it is a pickle, is far too long for a label, or holds something that is none.
        """
        if suffix == ".cls":
            return self._of_cls(member, source, f"{member.name} in {tar}")
        if suffix == ".json" and member.nbytes <= _LARGEST_JSON:
            return self._of_json(member, source, f"{member.name} in {tar}")
        return None

    def keys_seen(self) -> str:
        """Return the keys of `.json` files that said no class."""
        return f"; keys of .json files are {some(self._keys, 12)}" if self._keys else ""

    def _of_cls(self, member: Member, source: ObjectReader, where: str) -> str | None:
        if member.nbytes > _LARGEST_LABEL:
            raise UsageError(
                f"a label must be short, {where} has {member.nbytes} bytes; write the class's name or number"
            )
        content = read_member(source, member)
        try:
            text = content.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            what = "a pickle, which is never opened" if content[:1] == b"\x80" else "no UTF-8 text"
            raise UsageError(f"{where} is {what}; write the class's name or number as text") from error
        if text.startswith("\x80"):
            raise UsageError(f"{where} is a pickle, which is never opened; write the class as text")
        return self._said(class_of(text, self._options, where), ".cls files")

    def _of_json(self, member: Member, source: ObjectReader, where: str) -> str | None:
        try:
            values = json.loads(read_member(source, member).decode("utf-8-sig"))
        except (ValueError, RecursionError):
            return None
        if not isinstance(values, dict):
            return None
        if self._options.label_column is not None and self._options.label_column not in values:
            return None
        key = chosen_column(list(values), self._options, where)
        if key is None:
            self._keys.update(values)
            return None
        return self._said(class_of(values[key], self._options, where), f"{key!r} in .json files")

    def _said(self, name: str | None, source: str) -> str | None:
        if name is not None:
            self.said_by.add(source)
        return name


def read_member(source: ObjectReader, member: Member) -> bytes:
    """Return the bytes of a small file in a tar; a sparse one is put together."""
    if member.problem is not None:
        return b""
    return read_parts(source, member.offset, member.nbytes, member.parts)


def read_parts(
    source: ObjectReader, offset: int, nbytes: int, parts: tuple[tuple[int, int, int], ...] | None
) -> bytes:
    """Return the bytes of a file in a tar, with zeros between the pieces of a sparse one."""
    if parts is None:
        return source.read(nbytes, offset)
    content = bytearray(nbytes)
    for first, place, length in parts:
        content[first : first + length] = source.read(length, place)
    return bytes(content)
