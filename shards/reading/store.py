"""A finished store: `open_store` checks that it is whole, and its readers deliver rows.

Opening looks at every object's existence and size, which takes milliseconds; digests are for `pipeline
verify`, and a row's checksum is compared when the row is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import StoreDamagedError, UsageError
from shards.formats import RowLocator, format_of, object_path
from shards.metadata.arrays import read_array
from shards.metadata.code_table import read_code
from shards.metadata.commit import CommitRecord
from shards.metadata.identity import MIRRORED_VIEWS, Recipe
from shards.metadata.index import Index
from shards.metadata.layout import (
    FIELDS,
    INDEX,
    MANIFEST,
    ROOT,
    Field,
    commit_path,
    field_of,
    plan_path,
    stage_path,
)
from shards.metadata.manifest import Manifest, missing_objects
from shards.metadata.plan import NO_LABEL, Plan
from shards.metadata.repaired import require_planned
from shards.metadata.root import read_recipe
from shards.metadata.token_statistics import (
    GIVEN,
    GivenStatistics,
    Statistics,
    merged_statistics,
    read_error,
    read_given,
)
from shards.reading.open_files import OPEN_FILES
from shards.reading.order import Order, RowOrder
from shards.reading.reader import MirroredReader, RowReader, ShardOpener, StoredReader, Verify
from shards.reading.remote_reader import RemoteReader
from shards.reading.shard_file import ReadMode
from shards.storage.location import Location, as_location, local_path, require_plain, storage_of
from shards.storage.range_cache import RangeCache
from shards.values.dtypes import bfloat16_to_float32
from shards.values.quantize import Int8Code


def open_store(path: str | Location, cache: RangeCache | None = None, *, follow_links: bool = False) -> Store:
    """Open a finished store for reading.

    Args:
        path: Its folder or URL.
        cache: Where rows from a server are kept on this machine.
        follow_links: Read objects that are behind links inside the store. The folder itself may always be a link.

    Raises:
        UsageError: If there is no store at ``path``, a cache is given for one of this machine, or an object is behind
            a link that is not to be followed.
        StoreIncompleteError: If it has no manifest yet.
        StoreDamagedError: If an object is missing or of another size than the manifest says.
    """
    path = as_location(path)
    if cache is not None and not storage_of(path).is_remote:
        raise UsageError(f"--cache is for stores on a server, and {path} is on this machine; leave it out")
    begun = read_recipe(path)
    manifest = Manifest.read(path)
    own = read_recipe(path, manifest.revision)
    if manifest.recipe.id != own.id or not own.extends(begun):
        differences = "; ".join(manifest.recipe.diff(own) or own.diff(begun))
        raise StoreDamagedError(f"{path}: zarr.json and manifest.json name different recipes: {differences}")
    names = [record.path for record in manifest.objects]
    require_plain(path, [ROOT, MANIFEST, *names], follow_links=follow_links)
    problems = missing_objects(path, manifest.objects)
    if problems and Manifest.read(path) != manifest:
        return open_store(path, cache, follow_links=follow_links)  # it was extended in this instant
    if problems:
        more = f" and {len(problems) - 1} more objects are damaged" if len(problems) > 1 else ""
        raise StoreDamagedError(f"{path}: {problems[0]}{more}; run `pipeline verify` for the whole list")
    return Store(path, manifest, cache, follow_links=follow_links)


class Store:
    """A finished store.

    Attributes:
        path: Its folder.
        manifest: What it consists of.
        follow_links: Whether what is behind links inside it is read.
    """

    def __init__(
        self,
        path: Location,
        manifest: Manifest,
        cache: RangeCache | None = None,
        *,
        follow_links: bool = False,
        stage: int | None = None,
        num_views: int | None = None,
    ) -> None:
        self.path = path
        self._cache = cache
        self.manifest = manifest
        self.follow_links = follow_links
        self._stage = len(manifest.recipe.earlier) if stage is None else stage
        self._num_views = num_views

    def at_stage(self, stage: int, num_views: int | None = None) -> Store:
        """Return the store as it was before it was added to: its rows, labels, classes, views and statistics of then.

        Args:
            stage: Number of extensions there were, counted from 0; `len(recipe.earlier)` is the store as it is.
            num_views: Number of views there were; None: as now.
        """
        return Store(
            self.path,
            self.manifest,
            self._cache,
            follow_links=self.follow_links,
            stage=stage,
            num_views=num_views,
        )

    def as_known_by(self, id: str) -> Store | None:  # noqa: A002 - the name of the attribute it is compared with
        """Return the store as it was when its `id` was this one, now or before images or views were added.

        Returns:
            It, or None if it never was.
        """
        recipe = self.manifest.recipe
        for state in recipe.states():
            if recipe.at_stage(*state).id == id:
                return self.at_stage(*state)
        return None

    @property
    def images_since(self) -> int:
        """Images that the store on the disk has and this one, of an earlier stage, has not."""
        return self.manifest.recipe.num_images - self.recipe.num_images

    @property
    def classes_since(self) -> tuple[str, ...]:
        """Names of classes that the store on the disk has and this one, of an earlier stage, has not."""
        if not self.images_since:
            return ()
        return self.at_stage(len(self.manifest.recipe.earlier)).class_names[self.num_classes :]

    @property
    def views_since(self) -> tuple[str, ...]:
        """Views that the store on the disk has and this one, of an earlier state, has not."""
        return self.manifest.recipe.views[len(self.views) :]

    @cached_property
    def recipe(self) -> Recipe:
        """What the store was made by."""
        return self.manifest.recipe.at_stage(self._stage, self._num_views)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def id(self) -> str:
        """Digest of the recipe, by which stores are known."""
        return self.recipe.id

    def order(
        self, rows: NDArray[np.int64], *, seed: int, group: int | None, global_batch_size: int
    ) -> Order:
        """Return the infinite stream of some of its rows.

        Args:
            rows: Rows of an epoch, ascending, int64[n].
            seed: Names the order.
            group: How far rows are mixed; see `shards.reading.order.RowOrder`.
            global_batch_size: Samples of a step; the order of a single store does not depend on it.
        """
        return RowOrder(rows, seed, group, capacity=self.capacity)

    @property
    def is_remote(self) -> bool:
        """Whether it is on a server, so that each request takes a round trip."""
        return storage_of(self.path).is_remote

    @property
    def num_rows(self) -> int:
        """Length of axis 0 of every array, spare rows included."""
        return self.recipe.num_rows

    @property
    def capacity(self) -> int:
        """Rows of a shard: row = shard · capacity + slot."""
        return self.recipe.capacity

    @property
    def views(self) -> tuple[str, ...]:
        """Ways the images were shown to the encoder."""
        return self.recipe.views

    @property
    def grid(self) -> tuple[int, int]:
        """Token rows and columns (h, w)."""
        return self.recipe.encoder.grid

    @property
    def width(self) -> int:
        """Channels of a token (D)."""
        return self.recipe.encoder.width

    @property
    def num_tokens(self) -> int:
        """Tokens of an image (N = h·w)."""
        return self.recipe.encoder.num_tokens

    @property
    def image_size(self) -> int:
        """Side P of the stored images in pixels; 0 if the store has none."""
        return self.recipe.image_size

    @cached_property
    def plan(self) -> Plan:
        """Which image went where."""
        path = plan_path(self.manifest.recipe)
        self.object_bytes(path)
        plan = Plan.read(self.path / path)
        require_planned(self.manifest.recipe, plan, path=self.path / path)
        return plan.at_stage(self._stage)

    @cached_property
    def repaired(self) -> dict[str, int]:
        """Size in bytes by key, of each image file that was repaired after the plan was made and has another now."""
        nbytes = self.index.table("nbytes")["nbytes"].to_numpy()
        changed = np.flatnonzero(nbytes != self.plan.nbytes)
        return dict(zip(self.plan.keys[changed].tolist(), nbytes[changed].tolist(), strict=True))

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each label."""
        return self.plan.class_names

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return len(self.class_names)

    def class_name(self, label: int) -> str:
        """Return the name of a label; the number itself where it has none, and "none" of -1."""
        if label < 0:
            return "none"
        return self.class_names[label] if label < self.num_classes else str(label)

    @cached_property
    def index(self) -> Index:
        """The plan with validity, reasons and checksums, by column."""
        return Index(
            self._derived_bytes(INDEX),
            self.recipe.planned_rows,
            self.num_rows,
            path=self.path / self.manifest.derived(INDEX),
            num_images=self.manifest.recipe.num_images,
        )

    @cached_property
    def labels(self) -> NDArray[np.int32]:
        """Class of each row, int32[num_rows]; -1 where there is none."""
        labels: NDArray[np.int32] = read_array(self._derived_bytes, "label")
        if (
            labels.dtype != np.int32
            or labels.ndim != 1
            or len(labels) < self.num_rows
            or labels.min() < NO_LABEL
        ):
            raise StoreDamagedError(f"{self.path}: label does not hold a class a row; run `pipeline verify`")
        return labels[: self.num_rows]

    @cached_property
    def valid_rows(self) -> NDArray[np.int64]:
        """Rows that hold an image in every view, ascending, int64[k]."""
        valid = read_array(self._derived_bytes, "valid")
        if valid.dtype != np.bool_ or valid.ndim != 1 or len(valid) < self.num_rows:
            raise StoreDamagedError(f"{self.path}: valid does not hold a mark a row; run `pipeline verify`")
        rows = np.flatnonzero(valid[: self.num_rows]).astype(np.int64)
        if not self.views_since:
            return rows
        # A view that was added since may lack rows that the views of then have.
        absent = np.setdiff1d(self.recipe.planned_rows, rows)
        bad = {
            int(shard) * self.capacity + slot
            for view in self.views
            for shard in np.unique(absent // self.capacity)
            for slot in self.commit(view, int(shard)).bad
        }
        return np.union1d(rows, [row for row in absent.tolist() if row not in bad]).astype(np.int64)

    @cached_property
    def code(self) -> Int8Code | None:
        """What the int8 numbers of the tokens encode; None for other storage types."""
        return read_code(self.object_bytes, self.recipe) if self.recipe.dtype == "int8" else None

    def decode(self, tokens: NDArray[Any]) -> NDArray[np.float32]:
        """Return the numbers that tokens as a reader delivers them encode, exactly.

        Args:
            tokens: [..., D] of the storage type.
        """
        if self.code is not None:
            return self.code.decode(tokens)
        if self.recipe.dtype == "bfloat16":
            return bfloat16_to_float32(tokens)
        return tokens.astype(np.float32)

    def code_error(self, view: str) -> NDArray[np.float64] | None:
        """Return the int8 error of each channel of a view, float64[D]; None for other storage types.

        Measured on every row while encoding: RMS error as a share of the channel's own deviation.
        """
        self._require_views([view])
        if self.recipe.dtype != "int8":
            return None
        return read_error(self._derived_bytes, view)

    def object_bytes(self, path: str) -> bytes:
        """Return the content of one of the store's small objects, compared with its digest in the manifest.

        Raises:
            StoreDamagedError: If it is missing or not the one that was written.
        """
        return self.manifest.object_bytes(self.path, path)

    def commit(self, view: str, shard: int) -> CommitRecord:
        """Return the commit record of a shard of a view.

        Raises:
            StoreDamagedError: If its record is missing or not the one that was written.
        """
        self._require_views([view])
        path = commit_path(view, shard)
        record = CommitRecord.from_bytes(self.object_bytes(path), path=self.path / path)
        record.require_fits(self.recipe, path=self.path / path)
        return record

    def _derived_bytes(self, name: str) -> bytes:
        if name.startswith("stats/") and self._stage < len(self.manifest.recipe.earlier):
            name = stage_path(name, self._stage)
        return self.object_bytes(self.manifest.derived(name))

    @cached_property
    def given_statistics(self) -> GivenStatistics | None:
        """What readers normalise by in place of the tokens' own statistics, if a file was given for that."""
        if GIVEN not in self.manifest.by_path:
            return None
        return read_given(self.object_bytes, (self.width, *self.grid))

    def statistics(self, views: Iterable[str] | None = None, *, exact: bool = False) -> Statistics:
        """Return the mean and variance that normalise the tokens of some views, by default of all views together.

        Args:
            views: Some of `views`. Statistics that a file gave are one for all of them.
            exact: The tokens' own, also where the store was given others.

        Raises:
            UsageError: If the store lacks one of the views.
        """
        views = self.views if views is None else tuple(views)
        self._require_views(views)
        if self.given_statistics is not None and not exact:
            return self.given_statistics.statistics
        return merged_statistics(self._derived_bytes, views, (self.width, *self.grid))

    def _require_views(self, views: Iterable[str]) -> None:
        for view in views:
            if view not in self.views:
                raise UsageError(f"{self.path} has the views {', '.join(self.views)}, not {view!r}")

    @property
    def added_fields(self) -> tuple[str, ...]:
        """Names of the fields that were added."""
        return tuple(self.manifest.fields)

    def field(self, name: str) -> Store:
        """Return a field that was added: the same rows through another encoder, a store of its own.

        Raises:
            UsageError: If there is none of this name, or the store was extended since and the field was not.
        """
        if name not in self.manifest.fields:
            raise UsageError(
                f"{self.path} has the added fields {', '.join(self.manifest.fields) or '(none)'}, not {name!r}; "
                "add one with `pipeline add-field`"
            )
        found = open_store(self.path / FIELDS / name, self._cache)
        if len(found.recipe.earlier) < self._stage:
            lacking = self.recipe.num_images - found.recipe.num_images
            raise UsageError(
                f"field {name} of {self.path} is behind by {lacking} images; "
                f"`{found.catch_up_command}` catches up"
            )
        return found.at_stage(self._stage)

    @property
    def catch_up_command(self) -> str:
        """The command that gives this store, if it is an added field, the rows that its own store was extended by."""
        derived = " --compressor SNAPSHOT" if self.recipe.encoder.compressor is not None else ""
        return f"pipeline extend {self.path} {self.path.parent.parent}{derived}"

    def reader(
        self, view: str, field: str, *, mode: ReadMode = "auto", verify: Verify = "first"
    ) -> RowReader:
        """Return a reader of one field of one view.

        Args:
            view: One of `views`. The image of a mirrored view is read from the view it mirrors.
            field: ``tokens``, ``image``, ``cls``, or the name of an added field, for its tokens of the same rows.
            mode: How bytes are read; see `shards.reading.shard_file`.
            verify: When a row's checksum is compared; see `shards.reading.reader.Verify`.

        Raises:
            UsageError: If the store has no such view or field.
        """
        if field in self.manifest.fields:
            return self.field(field).reader(view, "tokens", mode=mode, verify=verify)
        self._require_views([view])
        if field == "image" and self.image_size and view in MIRRORED_VIEWS:
            return MirroredReader(self.reader(MIRRORED_VIEWS[view], field, mode=mode, verify=verify))
        if field not in self.recipe.fields(view):
            remedy = "--class-token" if field == "cls" else "--image-size"
            raise UsageError(
                f"{self.path} has no {field!r} for view {view!r}; encode with {remedy} to store it"
            )
        return self._reader_of(field_of(self.recipe, view, field), mode, verify)

    def _reader_of(self, field: Field, mode: ReadMode, verify: Verify) -> RowReader:
        recipe = self.recipe
        offsets = None if format_of(recipe).has_row_index else self.index.offsets(field.path)
        locator = RowLocator(recipe, field, offsets)
        folder = local_path(self.path)
        if folder is None:
            return RemoteReader(
                field,
                self.capacity,
                self.path,
                lambda shard: self.manifest.by_path[object_path(recipe, field, shard)],
                locator,
                checksums=lambda: self.index.checksums(field.path),
                verify=verify,
                cache=self._cache,
            )
        return StoredReader(
            field,
            self.capacity,
            ShardOpener(folder, locator, mode),
            checksums=lambda: self.index.checksums(field.path),
            verify=verify,
            open_files=OPEN_FILES,
            mode=mode,
            num_shards=self.recipe.num_shards,
        )
