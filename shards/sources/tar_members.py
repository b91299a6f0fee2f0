"""Images out of tars that may have been packed again since they were listed.

By offset where the tar's identity and the member's header agree with the listing, else by name.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING

from shards.metadata.archives import ArchiveIdentity
from shards.sources.archives import identity_now, open_source
from shards.sources.found import FoundImage
from shards.sources.tar_headers import BLOCK, LARGEST_FILE, plain_file
from shards.sources.webdataset import read_parts, split_sample_name
from shards.storage.location import Location, open_object
from shards.storage.object_reader import ObjectReader

if TYPE_CHECKING:
    from shards.sources.reading import ImagePlace

_OPEN_ARCHIVES = 64
_REPETITION = re.compile(r"#\d+$")


class MemberGoneError(Exception):
    """A tar holds no usable image of a name; the message is the reason."""


class TarMembers:
    """Bytes of images in tars; may be used by several threads at once.

    A tar whose size and time are those of the listing is read by offset, once the header in front says the image's name
    and length. One that was touched since, or whose header says otherwise, is walked once, and its images are
    found by name.

    Args:
        archives: What each tar was when it was listed, by address; of others the header alone decides.
    """

    def __init__(self, archives: Mapping[str, ArchiveIdentity]) -> None:
        self._listed = archives
        self._open: OrderedDict[Location, ObjectReader] = OrderedDict()
        self._untouched: dict[Location, bool] = {}
        self._by_key: dict[Location, Future[dict[str, FoundImage]]] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close all archives."""
        with self._lock:
            self._open.clear()

    def read(self, path: Location, image: ImagePlace, *, any_size: bool) -> bytes:
        """Return the bytes of one image.

        Raises:
            MemberGoneError: If the tar holds it no more, or it cannot be read.
            OSError: If the tar is gone, or its device fails.
        """
        if (
            self._is_untouched(path, image.uri)
            and image.offset >= BLOCK
            and 0 <= image.nbytes <= LARGEST_FILE
        ):
            content = self._range(path, image.offset - BLOCK, image.nbytes + BLOCK)
            header = plain_file(content[:BLOCK]) if len(content) == image.nbytes + BLOCK else None
            if header is not None and header[1] == image.nbytes and _names(image.key, header[0]):
                return content[BLOCK:]
        found = self._found(path, image)
        if found.problem is not None:
            raise MemberGoneError(found.problem)
        if found.nbytes != image.nbytes and not any_size:
            raise MemberGoneError(
                f"changed since it was listed: {image.nbytes} bytes then, {found.nbytes} now"
            )
        if found.nbytes > LARGEST_FILE:
            raise MemberGoneError(f"{found.nbytes} bytes are more than an image may have, {LARGEST_FILE}")
        with open_object(path) as source:
            return read_parts(source, found.offset, found.nbytes, found.parts)

    def _is_untouched(self, path: Location, uri: str) -> bool:
        if path not in self._untouched:
            listed = self._listed.get(uri)
            self._untouched[path] = listed is None or listed.same_file(identity_now(path))
        return self._untouched[path]

    def _found(self, path: Location, image: ImagePlace) -> FoundImage:
        by_key = self._images(path, take_readable=self._was_lossy(image.uri))
        found = by_key.get(image.key) or by_key.get(_REPETITION.sub("", image.key))
        if found is None:
            raise MemberGoneError(f"missing: {path.name} holds no image of this name any more")
        return found

    def _was_lossy(self, uri: str) -> bool:
        listed = self._listed.get(uri)
        return listed is not None and listed.lost > 0

    def _images(self, path: Location, *, take_readable: bool) -> dict[str, FoundImage]:
        """Return the images of a tar by key; one thread walks it, others that want it wait."""
        with self._lock:
            found = self._by_key.get(path)
            walked: Future[dict[str, FoundImage]] = Future() if found is None else found
            self._by_key[path] = walked
        if found is None:
            try:
                walked.set_result(_listed_anew(path, take_readable=take_readable))
            except BaseException as error:
                walked.set_exception(error)
                with self._lock:
                    self._by_key.pop(path, None)  # whoever asks again, tries again
        return walked.result()

    def _range(self, path: Location, offset: int, nbytes: int) -> bytes:
        with self._lock:
            source = self._open.pop(path, None)
            if source is None:
                source = open_source(path, read_ahead=False)
            self._open[path] = source
            if len(self._open) > _OPEN_ARCHIVES:
                self._open.popitem(last=False)  # closed by the last thread that reads it
        return source.read(nbytes, offset)


def _names(key: str, member: str) -> bool:
    """Return whether a key is one that a member of this name gets: `TAR/NAME` with or without its ending."""
    for text in (key, _REPETITION.sub("", key)):
        rest = text.partition("/")[2]
        if rest in (member, split_sample_name(member)[0]):
            return True
    return False


def _listed_anew(path: Location, *, take_readable: bool) -> dict[str, FoundImage]:
    from shards.sources.find import unique_keys
    from shards.sources.found import SourceOptions
    from shards.sources.tars import TarListing

    with open_source(path):
        pass  # it is a regular file
    listing = TarListing(SourceOptions(take_readable=take_readable), names_alone=True)
    images = sorted(listing.find([path]).images, key=lambda image: (image.key, image.offset))
    return {image.key: image for image in unique_keys(images)}
