"""Where a row's pictures come from: its image file, or the pictures that a finished store holds already."""

from collections.abc import Collection
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from pipeline.settings.config import EncodeConfig
from pipeline.sources.known_roots import known_roots, roots_of_source
from pipeline.sources.pictures import Images, Pictures
from shards import (
    MIRRORED_VIEWS,
    BadImageError,
    Plan,
    Recipe,
    SourceReader,
    SourceRecord,
    SourceRoots,
    Store,
    as_location,
    is_store,
    open_store,
)


class PictureSource(Protocol):
    """Gives the pictures of rows; may be used by several threads at once."""

    @property
    def pictures(self) -> Pictures:
        """The pictures of all views."""

    def current_size(self, record: SourceRecord) -> int:
        """Bytes that an image has now; others than the record says if its file was repaired meanwhile.

        Raises:
            BadImageError: If there is nothing to be read.
        """

    def read(self, record: SourceRecord, views: Collection[str]) -> Any:
        """What the pictures of an image are made from.

        Raises:
            BadImageError: If this image cannot be used.
        """

    def draw(self, content: Any, record: SourceRecord, views: Collection[str], out: Images) -> None:
        """Makes the pictures that some views show, of what `read` gave, into uint8 [V, P, P, 3].

        Raises:
            UndecodableImageError: If it is not one whole image.
            BadImageError: If it cannot be used for another reason.
        """

    def close(self) -> None:
        """Lets go of open files."""


class ImageFiles:
    """Pictures cut from the image files that the plan names."""

    def __init__(self, reader: SourceReader, pictures: Pictures) -> None:
        self.pictures = pictures
        self._reader = reader

    def current_size(self, record: SourceRecord) -> int:
        """See `PictureSource.current_size`."""
        return len(self._reader.read(record, any_size=True))

    def read(self, record: SourceRecord, views: Collection[str]) -> bytes:
        """See `PictureSource.read`."""
        return self._reader.read(record)

    def draw(self, content: bytes, record: SourceRecord, views: Collection[str], out: Images) -> None:
        """See `PictureSource.draw`."""
        self.pictures.draw(content, record.key, views, out)

    def close(self) -> None:
        """See `PictureSource.close`."""
        self._reader.close()


class StoredImages:
    """Pictures as a finished store holds them, by key; each is compared with its checksum."""

    def __init__(self, store: Store, pictures: Pictures) -> None:
        self.pictures = pictures
        self._store = store
        held = [name for name in pictures.names if name in store.views]
        self._readers = {name: store.reader(name, "image") for name in held}

    def current_size(self, record: SourceRecord) -> int:
        """See `PictureSource.current_size`."""
        return record.nbytes

    @cached_property
    def _rows(self) -> dict[str, tuple[int, str | None]]:
        """Row and, where it is bad, reason of each image by key."""
        table = self._store.index.table("key", "row", "reason")
        columns = (table[name].to_pylist() for name in ("key", "row", "reason"))
        return {key: (row, reason) for key, row, reason in zip(*columns, strict=True)}

    def read(self, record: SourceRecord, views: Collection[str]) -> dict[str, Images]:
        """See `PictureSource.read`."""
        row, reason = self._rows[record.key]
        if reason is not None:
            raise BadImageError(reason)
        found = {}
        for name in dict.fromkeys(MIRRORED_VIEWS.get(view, view) for view in views):
            image = np.empty((1, self.pictures.size, self.pictures.size, 3), np.uint8)
            self._readers[name].read([row], image)
            found[name] = image[0]
        return found

    def draw(
        self, content: dict[str, Images], record: SourceRecord, views: Collection[str], out: Images
    ) -> None:
        """See `PictureSource.draw`."""
        for name, image in content.items():
            out[self.pictures.names.index(name)] = image

    def close(self) -> None:
        """See `PictureSource.close`."""


def holds_pictures(store: Store, recipe: Recipe, views: Collection[str]) -> bool:
    """Whether a store holds, in the right size, all that some views of a recipe show."""
    shown = {MIRRORED_VIEWS.get(view, view) for view in views}
    # Another seed cuts other crops.
    same_places = shown <= {"center"} or store.recipe.seed == recipe.seed
    return same_places and Pictures(recipe).size == store.image_size and shown <= set(store.views)


def picture_source(config: EncodeConfig, recipe: Recipe, views: Collection[str], plan: Plan) -> PictureSource:
    """The pictures of some views of a recipe.

    Args:
        config: Names what the plan was made from. A store that holds the pictures gives them itself; of
        another one, and
            of everything else, they are cut from the files that the plan names.
        recipe: What is written.
        views: Views that are needed.
        plan: Says what the archives were that its offsets belong to.
    """
    pictures = Pictures(recipe, config.work.max_pixels)
    if is_store(config.source_path()):
        store = open_store(as_location(config.source_path()))
        if holds_pictures(store, recipe, views):
            return StoredImages(store, pictures)
    return ImageFiles(SourceReader(plan.archives, SourceRoots.of(named_roots(config))), pictures)


def named_roots(config: EncodeConfig) -> tuple[str, ...]:
    """Where the user says that images may be read: with `--source`, and by naming a source of files."""
    source = config.source_path()
    own = () if is_store(source) else roots_of_source(source)
    return (*own, *config.reading.roots)


def with_known_roots(config: EncodeConfig) -> EncodeConfig:
    """The same settings, with the places that were named when the store they read from was made on this machine."""
    source = config.source_path()
    if not is_store(source):
        return config
    roots = (*config.reading.roots, *known_roots(as_location(source)))
    return replace(config, reading=replace(config.reading, roots=roots))
