"""Finding the rows that damaged bytes of a shard belong to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import StoreDamagedError
from shards.formats import RowLocator, format_of, scan_extents
from shards.integrity.problem import Problem
from shards.metadata.compression import field_codec, unpack_row
from shards.metadata.identity import Recipe
from shards.metadata.index import ABSENT, Index
from shards.metadata.layout import Field
from shards.metadata.plan import Plan
from shards.storage.checksum import crc32c
from shards.storage.location import Location, open_object
from shards.storage.object_reader import ObjectReader


def locate_damage(
    root: Location, recipe: Recipe, plan: Plan, index: Index, fields: Sequence[Field], shard: int, path: str
) -> Iterator[Problem]:
    """Explain why a shard's object of the right length has the wrong digest.

    Args:
        root: The store.
        recipe: Its recipe.
        plan: Its plan, intact.
        index: Its index, intact.
        fields: Fields the object holds.
        shard: Number of the shard.
        path: The object.
    """
    view = fields[0].view
    rows = np.arange(shard * recipe.capacity, (shard + 1) * recipe.capacity)
    found = False
    with open_object(root / path) as source:
        try:
            wrong = list(_wrong_rows(source, recipe, plan, index, fields, shard))
            if not wrong:
                wrong = list(_respelled_rows(source, root, recipe, fields, shard))
        except StoreDamagedError as error:
            yield Problem(path, f"its own index is damaged: {error}", view, shard)
            return
    for slot, what in wrong:
        found = True
        yield Problem(path, what, view, shard, int(rows[slot]))
    if not found:
        yield Problem(path, "is not the file that was written, outside its rows", view, shard)


def _wrong_rows(
    source: ObjectReader,
    recipe: Recipe,
    plan: Plan,
    index: Index,
    fields: Sequence[Field],
    shard: int,
) -> Iterator[tuple[int, str]]:
    part = slice(shard * recipe.capacity, (shard + 1) * recipe.capacity)
    extents = {}
    for field in fields:
        offsets = None if format_of(recipe).has_row_index else index.offsets(field.path)
        extents[field.name] = RowLocator(recipe, field, offsets)(source, shard)
    checksums = {field.name: index.checksums(field.path)[part] for field in fields}
    surroundings_intact = format_of(recipe).entry_check(fields, plan, shard)
    for slot in range(plan.shard_size(shard)):
        arrays: dict[str, NDArray[Any]] = {}
        for field in fields:
            offset = int(extents[field.name].offsets[slot])
            if offset == ABSENT:
                continue
            row = _row(source, field, offset, int(extents[field.name].sizes[slot]))
            if row is None or crc32c(row) != checksums[field.name][slot]:
                yield slot, f"{field.name} fails its checksum"
            else:
                arrays[field.name] = row
        if len(arrays) == len(fields):
            start = int(extents[fields[0].name].offsets[slot])
            if not surroundings_intact(source, slot, arrays, start):
                yield slot, "a member's name, label or description is damaged"


def _respelled_rows(
    source: ObjectReader, root: Location, recipe: Recipe, fields: Sequence[Field], shard: int
) -> Iterator[tuple[int, str]]:
    """Yield rows whose compressed bytes decode rightly and are still not the ones that were written.

    Some bits of a compressed row mean nothing. Compressing the row again shows them, under the library
    version that wrote it.
    """
    for field in fields:
        codec = field_codec(field)
        if codec is None:
            continue
        extents = scan_extents(root, recipe, field, shard)
        for slot in np.flatnonzero(extents.present).tolist():
            offset, size = int(extents.offsets[slot]), int(extents.sizes[slot])
            row = _row(source, field, offset, size)
            if row is not None and codec.encode(row) != source.read(size, offset):
                yield slot, f"{field.name} decodes to its numbers, but from other bytes than were written"


def _row(source: ObjectReader, field: Field, offset: int, size: int) -> NDArray[Any] | None:
    stored = np.frombuffer(source.read(size, offset), np.uint8)
    row = np.empty(field.row_shape, field.dtype.numpy)
    try:
        unpack_row(field, stored, row)
    except (RuntimeError, ValueError):
        return None
    return row
