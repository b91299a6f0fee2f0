"""What a storage format has to do: write the objects of a shard, and say where in them each row lies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shards.metadata.identity import Recipe
from shards.metadata.index import ABSENT
from shards.metadata.layout import Field
from shards.metadata.plan import Plan
from shards.storage.location import Location
from shards.storage.object_reader import ObjectReader
from shards.storage.output import OutputFile

EntryCheck = Callable[[ObjectReader, int, Mapping[str, NDArray[Any]], int], bool]
"""Whether what surrounds a row's numbers in an object is what was written.

It is given the open object, the row's slot, the row by field, and the first byte of the first field's numbers.
"""


@dataclass(frozen=True)
class Extents:
    """Where the rows of one field are in one object.

    Attributes:
        offsets: First byte by slot, int64[capacity]; -1 where there is no row.
        sizes: Stored bytes by slot, int64[capacity].
    """

    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]

    @property
    def present(self) -> NDArray[np.bool_]:
        """Whether a slot holds a row, bool[capacity]."""
        return np.not_equal(self.offsets, ABSENT)

    @cached_property
    def end(self) -> int:
        """First byte behind the last row."""
        return int((self.offsets + self.sizes)[self.present].max(initial=0))


class ShardOutputs(Protocol):
    """The objects of one shard of one view while they are being written."""

    @property
    def files(self) -> Sequence[OutputFile]:
        """The objects, in order of field."""

    @property
    def all_new(self) -> bool:
        """Whether none of the objects had been published before; those that had are not written again."""

    @property
    def offsets(self) -> dict[str, NDArray[np.int64]]:
        """First byte of each row by field and slot, for formats without a row index; else empty."""

    def write(self, first_slot: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Append rows of consecutive slots: C-contiguous arrays [k, *row_shape] by field."""

    def finish(self) -> list[str]:
        """Complete, flush and close the objects; returns their digests in the order of `files`."""


class Format(Protocol):
    """One way of storing the rows of a shard; the same rows and plan must always give the same bytes.

    A further format is a class with these members, a line in `shards.formats.FORMATS`, its name in
    `shards.metadata.identity.FormatName`, and a stock reader in `shards.testing.stock_readers`; see
    docs/adding-a-format.md.
    """

    shares_objects: bool
    """Whether the fields of a view are in one object a shard; else each field has an object of its own."""
    has_row_index: bool
    """Whether an object says itself where its rows are; else commit records and ``index.parquet`` keep it."""

    def object_path(self, field: Field, shard: int) -> str:
        """Return the name inside the store of the object that holds a shard of a field."""

    def documents(self, recipe: Recipe) -> dict[str, bytes]:
        """Return the objects that stock readers need beside the shards, by path; they depend on the recipe alone."""

    def open_outputs(
        self,
        root: Location,
        recipe: Recipe,
        plan: Plan,
        view: str,
        shard: int,
        pool: Executor,
        awaited: Collection[str] = (),
    ) -> ShardOutputs:
        """Begin the objects of a shard of a view; hashing and flushing may be done in ``pool``.

        Objects of ``awaited`` fields are not written: somebody else puts them there. Formats whose fields share an
        object await none.
        """

    def read_extents(self, source: ObjectReader, field: Field, shard: int, capacity: int) -> Extents:
        """Find the rows of a field by looking into an open object of the right length.

        Raises:
            StoreDamagedError: Naming the object, if its structure is damaged.
        """

    def entry_check(self, fields: Sequence[Field], plan: Plan, shard: int) -> EntryCheck:
        """Return a check of the bytes of a shard that are neither numbers of its rows nor an index of them."""
