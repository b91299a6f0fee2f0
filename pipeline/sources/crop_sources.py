"""Where a row's crops come from: its image file, or the crops that a finished store holds already."""

from collections.abc import Collection
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol, Self

import numpy as np
from PIL.Image import Image

from pipeline.settings.config import EncodeConfig
from pipeline.sources.crops import Crops, Images
from pipeline.sources.known_roots import known_roots, roots_of_source
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

_SAME_IMAGE = 8.0
"""Mean difference of two crops' pixels, in levels of 255, up to which they are one image: other versions of the
decoding libraries differ by less than one, other images by tens."""


class CropSource(Protocol):
    """Gives the crops of rows; may be used by several threads at once."""

    @property
    def crops(self) -> Crops:
        """The crops of all views."""

    def current_size(self, record: SourceRecord) -> int:
        """Return an image's size in bytes now; another than in the record if its file was repaired meanwhile.

        Raises:
            BadImageError: If there is nothing to be read.
        """

    def read(self, record: SourceRecord, views: Collection[str]) -> Any:
        """Read what the crops of an image are made from.

        Raises:
            BadImageError: If this image cannot be used.
        """

    def cut(self, content: Any, record: SourceRecord, views: Collection[str], out: Images) -> None:
        """Cut the crops of some views from what `read` returned, into uint8 [V, P, P, 3].

        Raises:
            UndecodableImageError: If it is not one whole image.
            BadImageError: If it cannot be used for another reason.
        """

    def close(self) -> None:
        """Close open files."""


class ImageFiles:
    """Crops cut from the image files that the plan names.

    Args:
        reader: Reads them.
        crops: What is cut from them.
        encoded: What a store shows of the same images, if one was made of them: a file that has become another image
            since, which names, sizes and times need not tell, is unusable.
    """

    def __init__(self, reader: SourceReader, crops: Crops, encoded: "EncodedImages | None" = None) -> None:
        self.crops = crops
        self._reader = reader
        self._encoded = encoded

    def current_size(self, record: SourceRecord) -> int:
        """See `CropSource.current_size`."""
        return len(self._reader.read(record, any_size=True))

    def read(self, record: SourceRecord, views: Collection[str]) -> bytes:
        """See `CropSource.read`."""
        return self._reader.read(record)

    def cut(self, content: bytes, record: SourceRecord, views: Collection[str], out: Images) -> None:
        """See `CropSource.cut`."""
        image = self.crops.decode(content)
        if self._encoded is not None:
            self._encoded.require_same(record.key, image)
        self.crops.cut(image, record.key, views, out)

    def close(self) -> None:
        """See `CropSource.close`."""
        self._reader.close()


class EncodedImages:
    """What a finished store shows of its images, to recognise them by when their files are read again."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._crops = Crops(store.recipe)
        self._view = self._crops.names[0]
        self._reader = store.reader(self._view, "image")

    @classmethod
    def of(cls, store: Store) -> Self | None:
        """Return the images of a store; None if it keeps none."""
        names = Crops(store.recipe).names
        return cls(store) if store.image_size and names else None

    def require_same(self, key: str, image: Image) -> None:
        """Refuse an image that is not the one a row was made from; of a row that is bad nothing is known.

        Raises:
            BadImageError: If it shows something else.
        """
        row, reason = self._rows[key]
        if reason is not None:
            return
        shape = (1, self._store.image_size, self._store.image_size, 3)
        stored, now = np.empty(shape, np.uint8), np.empty((len(self._crops.names), *shape[1:]), np.uint8)
        self._reader.read([row], stored)
        self._crops.cut(image, key, (self._view,), now)
        difference = float(np.abs(stored[0].astype(np.int16) - now[0]).mean())
        if difference > _SAME_IMAGE:
            raise BadImageError(
                "another image than the one that was encoded: their pixels differ by "
                f"{difference:.0f} of 255 levels on average"
            )

    @cached_property
    def _rows(self) -> dict[str, tuple[int, str | None]]:
        return rows_by_key(self._store)


def rows_by_key(store: Store) -> dict[str, tuple[int, str | None]]:
    """Return row and, where it is bad, reason of each image by key."""
    table = store.index.table("key", "row", "reason")
    columns = (table[name].to_pylist() for name in ("key", "row", "reason"))
    return {key: (row, reason) for key, row, reason in zip(*columns, strict=True)}


class StoredCrops:
    """Crops as a finished store holds them, by key; each is compared with its checksum."""

    def __init__(self, store: Store, crops: Crops) -> None:
        self.crops = crops
        self._store = store
        held = [name for name in crops.names if name in store.views]
        self._readers = {name: store.reader(name, "image") for name in held}

    def current_size(self, record: SourceRecord) -> int:
        """See `CropSource.current_size`."""
        return record.nbytes

    @cached_property
    def _rows(self) -> dict[str, tuple[int, str | None]]:
        return rows_by_key(self._store)

    def read(self, record: SourceRecord, views: Collection[str]) -> dict[str, Images]:
        """See `CropSource.read`."""
        row, reason = self._rows[record.key]
        if reason is not None:
            raise BadImageError(reason)
        found = {}
        for name in dict.fromkeys(MIRRORED_VIEWS.get(view, view) for view in views):
            image = np.empty((1, self.crops.size, self.crops.size, 3), np.uint8)
            self._readers[name].read([row], image)
            found[name] = image[0]
        return found

    def cut(
        self, content: dict[str, Images], record: SourceRecord, views: Collection[str], out: Images
    ) -> None:
        """See `CropSource.cut`."""
        for name, image in content.items():
            out[self.crops.names.index(name)] = image

    def close(self) -> None:
        """See `CropSource.close`."""


def holds_crops(store: Store, recipe: Recipe, views: Collection[str]) -> bool:
    """Return whether a store holds, in the right size, all that some views of a recipe show."""
    shown = {MIRRORED_VIEWS.get(view, view) for view in views}
    # Another seed cuts other crops.
    same_places = shown <= {"center"} or store.recipe.seed == recipe.seed
    return same_places and Crops(recipe).size == store.image_size and shown <= set(store.views)


def crop_source(config: EncodeConfig, recipe: Recipe, views: Collection[str], plan: Plan) -> CropSource:
    """Return the crops of some views of a recipe.

    Args:
        config: Names what the plan was made from. If that is a store that holds the crops, they are read from it;
            otherwise they are cut from the files that the plan names.
        recipe: What is written.
        views: Views that are needed.
        plan: Says what the archives were that its offsets belong to.
    """
    crops = Crops(recipe, config.work.max_pixels)
    encoded = None
    if is_store(config.source_path()):
        store = open_store(as_location(config.source_path()))
        if holds_crops(store, recipe, views):
            return StoredCrops(store, crops)
        encoded = EncodedImages.of(store)
    return ImageFiles(SourceReader(plan.archives, SourceRoots.of(named_roots(config))), crops, encoded)


def named_roots(config: EncodeConfig) -> tuple[str, ...]:
    """Return where the user says that images may be read: with `--source`, and by naming a source of files."""
    source = config.source_path()
    own = () if is_store(source) else roots_of_source(source)
    return (*own, *config.reading.roots)


def with_known_roots(config: EncodeConfig) -> EncodeConfig:
    """Return the same settings, with the places named when the store they read from was made on this machine."""
    source = config.source_path()
    if not is_store(source):
        return config
    roots = (*config.reading.roots, *known_roots(as_location(source)))
    return replace(config, reading=replace(config.reading, roots=roots))
