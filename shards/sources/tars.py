"""Images inside tar files, found once by offset and later read by range; nothing is ever unpacked.

Tars come in three kinds: a tar of one tar a class, as the ImageNet training set is downloaded; tars of one
class each; and
webdataset shards (`shards.sources.webdataset`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from shards.errors import UsageError
from shards.metadata.archives import ArchiveIdentity
from shards.sources.addresses import whole_address
from shards.sources.archives import identity_now
from shards.sources.found import (
    IMAGE_SUFFIXES,
    Found,
    FoundImage,
    LeftOut,
    SourceOptions,
    is_hidden,
    some,
    suffix_of,
)
from shards.sources.tar_headers import Kind, LostBytes, Member, normal_name, resolved, walk
from shards.sources.webdataset import FlatTar, find_in_flat_tars
from shards.storage.location import Location, open_object
from shards.storage.object_reader import ObjectReader

_WORDNET_ID = re.compile(r"n\d{8}")


@dataclass
class _Tar:
    """A tar that was walked once.

    Attributes:
        path: Where it is.
        files: Its files, links that lead to one of them included, that are not hidden, in order.
        identity: What it is now.
    """

    path: Location
    files: list[Member]
    identity: ArchiveIdentity

    @property
    def inner(self) -> list[Member]:
        """Tars inside."""
        return [member for member in self.files if suffix_of(member.name) == ".tar"]

    @property
    def images(self) -> list[Member]:
        """Images that are not in one of the tars inside."""
        return [member for member in self.files if suffix_of(member.name) in IMAGE_SUFFIXES]


@dataclass
class TarListing:
    """Lists tars, and counts what it leaves out.

    Attributes:
        options: What to take.
        left_out: Files that are no images.
        lost: What could not be read, if whatever is readable is taken.
        names_alone: Take keys and offsets, whatever the classes: for finding images again.
    """

    options: SourceOptions
    left_out: LeftOut = field(default_factory=LeftOut)
    lost: LostBytes = field(default_factory=LostBytes)
    names_alone: bool = False

    def find(self, paths: Sequence[Location]) -> Found:
        """Return every image of some tars; keys need not be unique yet.

        Raises:
            UsageError: If a tar is damaged, or tars of several kinds are side by side.
        """
        tars = [self._walked(path) for path in paths]
        archives = {whole_address(tar.path): tar.identity for tar in tars}
        nested = [tar for tar in tars if tar.inner]
        flat = [tar for tar in tars if tar.images]
        if self.names_alone:  # either kind may have been chosen
            return self._everything(tars, archives)
        if self.options.kind == "images":
            nested = []
        elif self.options.kind == "tar" or self.options.take_readable:
            flat = [tar for tar in flat if not tar.inner]
        if nested and flat:
            self._refuse_mixture(nested, flat)
        if nested:
            images = [image for tar in nested for image in self._of_inner_tars(tar)]
            found = Found(images, classes_from="the names of the inner tars", archives=archives)
        else:
            found = self._of_flat_tars(tars, archives)
        return found

    def _everything(self, tars: list[_Tar], archives: dict[str, ArchiveIdentity]) -> Found:
        inner = [image for tar in tars for image in self._of_inner_tars(tar)]
        flat = [FlatTar(tar.path, whole_address(tar.path), tar.images) for tar in tars]
        direct = find_in_flat_tars(flat, self.options, self.left_out)
        return Found([*inner, *direct.images], archives=archives)

    def notes(self) -> list[str]:
        """Return lines about what was left out and could not be read."""
        lines = self.left_out.lines()
        if self.lost.places:
            lines.append(
                f"{self.lost.nbytes} bytes could not be read and are left out: {some(self.lost.places)}"
            )
        return lines

    def _walked(self, path: Location) -> _Tar:
        before = self.lost.nbytes
        identity = identity_now(path)
        with open_object(path) as source:
            files = self._files(source, str(path))
        lost = self.lost.nbytes - before
        return _Tar(path, files, ArchiveIdentity(identity.nbytes, identity.modified, lost=lost))

    def _files(
        self, source: ObjectReader, what: str, start: int = 0, nbytes: int | None = None
    ) -> list[Member]:
        lost = self.lost if self.options.take_readable else None
        members = list(walk(source, what, start=start, nbytes=nbytes, lost=lost))
        files = []
        by_name: dict[str, Member] | None = None
        for member in members:
            if member.kind is Kind.FOLDER:
                continue
            if is_hidden(member.name):
                self.left_out.hidden += 1
            elif member.kind is Kind.SPECIAL:
                self.left_out.special += 1
            elif member.kind is Kind.FILE:
                files.append(member)
            else:
                by_name = by_name or {normal_name(m.name): m for m in members}
                files.append(_linked(member, by_name))
        return files

    def _of_inner_tars(self, outer: _Tar) -> list[FoundImage]:
        uri = whole_address(outer.path)
        found: list[FoundImage] = []
        self._count_others(outer.files)
        with open_object(outer.path) as source:
            for tar in outer.inner:
                if tar.parts is not None or tar.problem is not None:
                    raise UsageError(
                        f"{outer.path}: the inner tar {tar.name} cannot be read where it is "
                        f"({tar.problem or 'it is stored sparse'}); pack the outer one again"
                    )
                class_name = PurePosixPath(tar.name).stem
                what = f"the inner tar {tar.name} of {outer.path}"
                files = self._files(source, what, tar.offset, tar.nbytes)
                self._count_others(files)
                found += [
                    found_member(member, f"{class_name}/{member.name}", class_name, uri)
                    for member in files
                    if suffix_of(member.name) in IMAGE_SUFFIXES
                ]
        return found

    def _count_others(self, files: list[Member]) -> None:
        for member in files:
            suffix = suffix_of(member.name)
            if suffix != ".tar" and suffix not in IMAGE_SUFFIXES:
                self.left_out.endings[suffix] += 1

    def _of_flat_tars(self, tars: list[_Tar], archives: dict[str, ArchiveIdentity]) -> Found:
        self._count_inner(tars)
        flat = [FlatTar(tar.path, whole_address(tar.path), tar.files) for tar in tars]
        found = find_in_flat_tars(flat, self.options, self.left_out)
        images, source, instead = found.images, found.classes_from, found.instead
        if source is None and len(tars) > 1 and found.only_images and not found.in_folders:
            stems = [tar.path.stem for tar in tars]
            if are_class_names(stems):
                stem_of = {whole_address(tar.path): tar.path.stem for tar in tars}
                images = [with_class(image, stem_of[image.uri]) for image in images]
                source = "the names of the tars"
            else:
                instead = f"the tars are numbered ({some(stems)}), and hold no files that say a class"
        return Found(images, classes_from=source, instead=instead, notes=found.notes, archives=archives)

    def _count_inner(self, tars: list[_Tar]) -> None:
        self.left_out.endings.update({".tar": n} if (n := sum(len(tar.inner) for tar in tars)) else {})

    def _refuse_mixture(self, nested: list[_Tar], flat: list[_Tar]) -> None:
        both = next((tar for tar in nested if tar.images), None)
        if both is not None:
            raise UsageError(
                f"{both.path} holds {len(both.inner)} tars (such as {both.inner[0].name}) and "
                f"{len(both.images)} images "
                f"beside them (such as {both.images[0].name}); take one kind with --source-kind tar or "
                "--source-kind images"
            )
        raise UsageError(
            f"a tar of tars and a tar of images are side by side: {nested[0].path} holds tars such as "
            f"{nested[0].inner[0].name}, {flat[0].path} holds images such as {flat[0].images[0].name}; name "
            "one of them"
        )


def _linked(link: Member, by_name: dict[str, Member]) -> Member:
    """Return a link as the file of the same tar that it leads to, under its own name."""
    target = resolved(link, by_name)
    if target is None:
        problem = f"a {link.kind.value} to {link.target}, which is not a file of this tar"
        return Member(link.name, Kind.FILE, link.offset, 0, problem=problem)
    return Member(
        link.name, Kind.FILE, target.offset, target.nbytes, parts=target.parts, problem=target.problem
    )


def found_member(member: Member, key: str, class_name: str | None, uri: str) -> FoundImage:
    """Return a tar's member as an image."""
    nbytes = 0 if member.problem else member.nbytes
    return FoundImage(key, class_name, uri, member.offset, nbytes, member.parts, member.problem)


def with_class(image: FoundImage, class_name: str) -> FoundImage:
    """Return the same image with a class."""
    return FoundImage(
        image.key, class_name, image.uri, image.offset, image.nbytes, image.parts, image.problem
    )


def are_class_names(stems: Sequence[str]) -> bool:
    """Return whether tars are named for classes, and not numbered like the shards of one set.

    Names that are equal but for their digits are numbers, unless they are WordNet ids.
    """
    if all(_WORDNET_ID.fullmatch(stem) for stem in stems):
        return True
    return len({re.sub(r"\d+", "", stem) for stem in stems}) == len(stems)
