"""Which image goes where: the table that is written before anything else.

The images, sorted by key, are shuffled by a seed and assigned to exactly N shards, whose sizes differ by at
most one. Every shard has room for ``capacity`` = ⌈n / N⌉ rows, so row = shard · capacity + slot is an index
on axis 0 of every array; the spare rows at the end of the smaller shards hold nothing.

A plan is only ever appended to: `Plan.extended` assigns further images, shuffled among themselves, to further shards of
the same capacity, and leaves every row that was there as it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from shards.documents import read_document
from shards.draws import permutation
from shards.errors import StoreDamagedError, UsageError
from shards.metadata.archives import ArchiveIdentity
from shards.metadata.stages import Stage, check_stages, planned_rows, shard_capacity, shard_sizes
from shards.metadata.tables import read_table
from shards.storage.location import Location, read_object

if TYPE_CHECKING:
    import pyarrow as pa

PLAN_VERSION = 1
ARCHIVES_VERSION = 2
"""Of plans that say what the archives were that their offsets belong to; others are of version 1 as before."""
EXTENDED_VERSION = 3
"""Of plans that were extended."""
NO_LABEL = -1
_COLUMNS = {"key": "string", "label": "int32", "uri": "string", "offset": "int64", "nbytes": "int64"}


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """One source image.

    Attributes:
        key: Name that is unique in the source and does not depend on where the source is.
        label: Class, or -1 where there is none.
        uri: Where the bytes are: a path or an fsspec address.
        offset: First byte inside ``uri`` (0 unless the image is a member of a larger file).
        nbytes: Length in bytes.
    """

    key: str
    label: int
    uri: str
    offset: int
    nbytes: int


class Plan:
    """The images of a store in row order, and the classes they belong to.

    Attributes:
        class_names: Name of each label.
        num_shards: Exact number of shards, those of extensions included.
        seed: Seed of the shuffle.
        earlier: What it was before each of its extensions, the first one first.
        repaired: Size in bytes by key of each image whose file was repaired after it was listed, and has another size
            now (`shards.metadata.repaired`). Records and `nbytes` have it; equality, bytes and digest of a plan do not.
        archives: What each tar or parquet file was when its images were listed, by address. Plans are equal whatever
            it says: a copied archive has another time.
    """

    def __init__(
        self,
        table: pa.Table,
        class_names: tuple[str, ...],
        num_shards: int,
        seed: int,
        repaired: Mapping[str, int] = MappingProxyType({}),
        archives: Mapping[str, ArchiveIdentity] | None = None,
        earlier: tuple[Stage, ...] = (),
    ) -> None:
        self._table = table
        self.class_names = class_names
        self.num_shards = num_shards
        self.seed = seed
        self.repaired = repaired
        self.archives = dict(sorted((archives or {}).items()))
        self.earlier = earlier

    @classmethod
    def build(
        cls,
        records: Iterable[SourceRecord],
        class_names: Sequence[str],
        num_shards: int,
        seed: int,
        archives: Mapping[str, ArchiveIdentity] | None = None,
    ) -> Self:
        """Deal the records to shards.

        Args:
            records: The source images, in any order.
            class_names: Name of each label, by label.
            num_shards: Exact number of shards.
            seed: Seed of the shuffle; the same records and seed always give the same plan.
            archives: What each tar or parquet file was when it was listed, by address; of more than the records name.

        Raises:
            UsageError: If there are no records, a key comes twice, or there are more shards than images.
        """
        listing = sorted(records, key=lambda record: record.key)
        if not listing:
            raise UsageError("a store needs at least one source image, found none")
        for one, other in itertools.pairwise(listing):
            if one.key == other.key:
                raise UsageError(
                    f"source keys must be unique, {one.key!r} comes twice: {one.uri} and {other.uri}"
                )
        if not 1 <= num_shards <= len(listing):
            raise UsageError(f"shards must be between 1 and the {len(listing)} images, not {num_shards}")
        table = _dealt(listing, seed, stream="plan")
        named = {record.uri for record in listing}
        kept = {uri: archive for uri, archive in (archives or {}).items() if uri in named}
        return cls(table, tuple(class_names), num_shards, seed, archives=kept)

    @property
    def num_images(self) -> int:
        """Images in the plan (n)."""
        return int(self._table.num_rows)

    @property
    def capacity(self) -> int:
        """Rows of every shard, spare ones included."""
        return shard_capacity(self.num_images, self.num_shards, self.earlier)

    @property
    def num_rows(self) -> int:
        """Rows of every array, spare ones included."""
        return self.capacity * self.num_shards

    def shard_size(self, shard: int) -> int:
        """Return the number of images in a shard."""
        return self._sizes[shard]

    @cached_property
    def _sizes(self) -> list[int]:
        """Images in each shard."""
        sizes: list[int] = shard_sizes(self.num_images, self.num_shards, self.earlier).tolist()
        return sizes

    @cached_property
    def _ends(self) -> list[int]:
        """Images up to the end of each shard."""
        return list(itertools.accumulate(self._sizes))

    def rows_of(self, shard: int) -> range:
        """Return the rows of a shard that hold images, by slot."""
        first = shard * self.capacity
        return range(first, first + self.shard_size(shard))

    def records_of(self, shard: int) -> list[SourceRecord]:
        """Return the images of a shard, by slot."""
        size = self.shard_size(shard)
        part = self._now.slice(self._ends[shard] - size, size)
        return [SourceRecord(**values) for values in part.to_pylist()]

    def records(self, images: NDArray[np.int64]) -> list[SourceRecord]:
        """Return the records of some images by their index in row order, int64[k]; see `rows` for the row of each."""
        return [SourceRecord(**values) for values in self._now.take(images).to_pylist()]

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """Row of each image, ascending, int64[n]."""
        return planned_rows(self.num_images, self.num_shards, self.earlier)

    @cached_property
    def labels(self) -> NDArray[np.int32]:
        """Class of each image in row order, int32[n]; -1 where there is none."""
        return self._numpy("label")

    @cached_property
    def keys(self) -> NDArray[np.object_]:
        """Key of each image in row order."""
        return self._numpy("key")

    @cached_property
    def uris(self) -> NDArray[np.object_]:
        """Address of each image in row order."""
        return self._numpy("uri")

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """First byte of each image inside its address, in row order."""
        return self._numpy("offset")

    @cached_property
    def nbytes(self) -> NDArray[np.int64]:
        """Length of each image in bytes, in row order; of a repaired one what it is now."""
        return self._numpy("nbytes")

    def _numpy(self, column: str) -> NDArray[Any]:
        values: NDArray[Any] = self._now[column].to_numpy()
        return values

    @property
    def table(self) -> pa.Table:
        """The columns key, label, uri, offset and nbytes in row order, as they were listed."""
        return self._table

    @cached_property
    def _now(self) -> pa.Table:
        """`table` with the sizes of repaired images."""
        if not self.repaired:
            return self._table
        import pyarrow as pa

        listed = zip(self._table["key"].to_pylist(), self._table["nbytes"].to_pylist(), strict=True)
        sizes = pa.array([self.repaired.get(key, nbytes) for key, nbytes in listed], pa.int64())
        return self._table.set_column(self._table.column_names.index("nbytes"), "nbytes", sizes)

    def with_repaired(self, sizes: Mapping[str, int]) -> Self:
        """Return the plan with other sizes of repaired images, in bytes by key; keys of other plans are left out."""
        own = set(self._table["key"].to_pylist()) if sizes else ()
        repaired = {key: nbytes for key, nbytes in sizes.items() if key in own}
        return type(self)(
            self._table, self.class_names, self.num_shards, self.seed, repaired, self.archives, self.earlier
        )

    def as_listed_now(self) -> Self:
        """Return the plan that the images, as they are now, would be given."""
        return type(self)(
            self._now,
            self.class_names,
            self.num_shards,
            self.seed,
            archives=self.archives,
            earlier=self.earlier,
        )

    def recipe_values(self) -> dict[str, Any]:
        """Return the values that a store's recipe takes from its plan, by the recipe's own names."""
        return {
            "source_digest": self.source_digest(),
            "num_images": self.num_images,
            "num_shards": self.num_shards,
            "seed": self.seed,
            "earlier": self.earlier,
        }

    def as_stage(self) -> Stage:
        """Return the stage that an extension of this plan records."""
        return Stage(self.num_images, self.num_shards, len(self.class_names), self.source_digest())

    def extended(
        self,
        records: Iterable[SourceRecord],
        class_names: Sequence[str],
        archives: Mapping[str, ArchiveIdentity] | None = None,
    ) -> Self:
        """Return this plan with further images in further shards; every present row keeps its number.

        Args:
            records: The further images, in any order, one or more.
            class_names: Name of each label: this plan's, and any that are new behind them.
            archives: What each tar or parquet file was when it was listed, by address; of more than the records name.

        Raises:
            UsageError: If there are no records, a key comes twice, or a class has another label than before.
        """
        import pyarrow as pa

        listing = sorted(records, key=lambda record: record.key)
        if not listing:
            raise UsageError("an extension needs at least one new image, found none")
        taken = set(self._table["key"].to_pylist())
        for record, after in itertools.zip_longest(listing, listing[1:]):
            if record.key in taken or (after is not None and record.key == after.key):
                raise UsageError(f"source keys must be unique, {record.key!r} comes twice")
        if tuple(class_names[: len(self.class_names)]) != self.class_names:
            raise UsageError(
                f"an extension keeps the labels there are, {list(self.class_names[:5])}…, and was given "
                f"{list(class_names[:5])}…; add new classes behind them"
            )
        stages = (*self.earlier, self.as_stage())
        table = _dealt(listing, self.seed, stream=f"extension/{len(stages)}")
        named = {record.uri for record in listing}
        return type(self)(
            pa.concat_tables([self._table, table]).combine_chunks(),
            tuple(class_names),
            self.num_shards + -(-len(listing) // self.capacity),
            self.seed,
            self.repaired,
            {**self.archives, **{uri: one for uri, one in (archives or {}).items() if uri in named}},
            stages,
        )

    def at_stage(self, stage: int) -> Self:
        """Return the plan before one of its extensions, counted from 0; `len(earlier)` is the plan itself."""
        if stage == len(self.earlier):
            return self
        was = self.earlier[stage]
        table = self._table.slice(0, was.num_images).combine_chunks()
        plan = type(self)(
            table,
            self.class_names[: was.num_classes],
            was.num_shards,
            self.seed,
            archives=self.archives,
            earlier=self.earlier[:stage],
        )
        return plan.with_repaired(self.repaired)

    def _by_key(self) -> pa.Table:
        """Return the table sorted by key."""
        # By code points, as Python and pyarrow both compare text in UTF-8; without pyarrow's threads.
        return self._table.take(np.argsort(self._table["key"].to_numpy(), kind="stable"))

    def deals_images_of(self, extended: Plan) -> bool:
        """Return whether an extended plan's images, planned at once with its first settings, give this plan."""
        if not extended.earlier or self.earlier:
            return False
        asked = (self.num_shards, self.seed, self.class_names)
        given = (extended.earlier[0].num_shards, extended.seed, extended.class_names)
        return asked == given and bool(self._by_key().equals(extended._by_key()))

    def source_digest(self) -> str:
        """Return the digest of the source: sorted keys with size and label, and class names."""
        listing = self._by_key()
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        columns = (listing[name].to_pylist() for name in ("key", "nbytes", "label"))
        for key, nbytes, label in zip(*columns, strict=True):
            digest.update(f"{key}\0{nbytes}\0{label}\n".encode())
        return digest.hexdigest()[:32]

    def __eq__(self, other: object) -> bool:
        """Whether every column and setting is the same."""
        if not isinstance(other, Plan):
            return NotImplemented
        settings = ("class_names", "num_shards", "seed", "earlier")
        same = all(getattr(self, name) == getattr(other, name) for name in settings)
        return same and bool(self._table.equals(other._table))

    __hash__ = None  # type: ignore[assignment]

    def to_bytes(self) -> bytes:
        """Return the content of ``plan.parquet``; the same plan gives the same bytes under one version of pyarrow."""
        import pyarrow.parquet as pq

        settings = {
            "version": ARCHIVES_VERSION if self.archives else PLAN_VERSION,
            "num_shards": self.num_shards,
            "seed": self.seed,
            "class_names": list(self.class_names),
        }
        if self.archives:
            settings["archives"] = {uri: archive.to_dict() for uri, archive in self.archives.items()}
        if self.earlier:
            settings["version"] = EXTENDED_VERSION
            settings["earlier"] = [stage.to_dict() for stage in self.earlier]
        table = self._table.replace_schema_metadata({"shards.plan": json.dumps(settings, ensure_ascii=False)})
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        return buffer.getvalue()

    @classmethod
    def read(cls, path: Location) -> Self:
        """Read ``plan.parquet``.

        Raises:
            StoreDamagedError: If the file is not a plan of this version.
        """
        import pyarrow as pa

        try:
            table = read_table(read_object(path), _COLUMNS)
            text = (table.schema.metadata or {})[b"shards.plan"]
        except FileNotFoundError:
            raise StoreDamagedError(f"{path} is missing; restore it or encode again") from None
        except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
            raise StoreDamagedError(
                f"{path} is not a readable plan ({error}); restore it or encode again"
            ) from error
        settings = read_document(
            text, _Settings, name=path, error=StoreDamagedError, remedy="restore it or encode again"
        )
        version = settings.version
        try:
            check_stages(table.num_rows, settings.num_shards, settings.earlier)
        except ValueError as error:
            raise StoreDamagedError(f"{path} is not a readable plan ({error}); restore it") from error
        if version not in (PLAN_VERSION, ARCHIVES_VERSION, EXTENDED_VERSION):
            raise StoreDamagedError(
                f"{path} is a plan of version {version}; this program reads {PLAN_VERSION} to "
                f"{EXTENDED_VERSION}"
            )
        if not 1 <= settings.num_shards <= table.num_rows:
            raise StoreDamagedError(
                f"{path} has {table.num_rows} images in {settings.num_shards} shards; restore it or encode again"
            )
        for name, least in (("label", NO_LABEL), ("offset", 0), ("nbytes", 0)):
            if int(table[name].to_numpy().min()) < least:
                raise StoreDamagedError(f"{path} has a negative {name}; restore it or encode again")
        return cls(
            table.replace_schema_metadata(None),
            settings.class_names,
            settings.num_shards,
            settings.seed,
            archives=settings.archives,
            earlier=settings.earlier,
        )


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What ``plan.parquet`` says beside its columns, as JSON."""

    version: int
    num_shards: int
    seed: int
    class_names: tuple[str, ...]
    archives: dict[str, ArchiveIdentity] = dataclasses.field(default_factory=dict)
    earlier: tuple[Stage, ...] = ()


def _dealt(listing: Sequence[SourceRecord], seed: int, *, stream: str) -> pa.Table:
    """Shuffle records, sorted by key, by a stream of random words."""
    import pyarrow as pa

    shuffled = [listing[i] for i in permutation(len(listing), seed=seed, stream=stream).tolist()]
    return pa.table(
        {
            "key": pa.array([r.key for r in shuffled], pa.string()),
            "label": pa.array([r.label for r in shuffled], pa.int32()),
            "uri": pa.array([r.uri for r in shuffled], pa.string()),
            "offset": pa.array([r.offset for r in shuffled], pa.int64()),
            "nbytes": pa.array([r.nbytes for r in shuffled], pa.int64()),
        }
    )
