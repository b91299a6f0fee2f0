"""Describing a published shard from nothing but its bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import StoreDamagedError
from shards.formats import format_of, object_path, scan_extents
from shards.metadata.code_table import published_code
from shards.metadata.commit import CommitRecord, ObjectRecord
from shards.metadata.compression import unpack_row
from shards.metadata.identity import Recipe
from shards.metadata.index import ABSENT
from shards.metadata.layout import Field, fields_of, moments_path
from shards.metadata.plan import Plan
from shards.storage.checksum import crc32c
from shards.storage.digests import ALGORITHMS, SHA256
from shards.storage.location import Location, open_object
from shards.storage.object_reader import blocks_of
from shards.values.moments import Moments, RowSums


def object_record(root: Location, path: str, algorithm: str = SHA256) -> ObjectRecord:
    """Return the size and digest of an object from its bytes.

    Raises:
        FileNotFoundError: If it does not exist.
    """
    digest = ALGORITHMS[algorithm]()
    with open_object(root / path) as source:
        for block in blocks_of(source):
            digest.update(block)
        return ObjectRecord(path, source.size, digest.hexdigest(), algorithm)


def published_rows(
    root: Location, recipe: Recipe, field: Field, shard: int
) -> Iterator[tuple[int, NDArray[Any] | None]]:
    """Yield every slot of a shard with its row, or None where there is none, in order.

    The row's array is reused for the next one.

    Raises:
        StoreDamagedError: Naming the slot, if the object is damaged.
    """
    extents = scan_extents(root, recipe, field, shard)
    path = root / object_path(recipe, field, shard)
    row = np.empty(field.row_shape, field.dtype.numpy)
    with open_object(path) as source:
        if extents.end > source.size:
            raise StoreDamagedError(
                f"{path} ends at byte {source.size}, its rows at {extents.end}: truncated"
            )
        for slot, (offset, size) in enumerate(
            zip(extents.offsets.tolist(), extents.sizes.tolist(), strict=True)
        ):
            if offset == ABSENT:
                yield slot, None
                continue
            stored = np.frombuffer(source.read(size, offset), np.uint8)
            try:
                unpack_row(field, stored, row)
            except (RuntimeError, ValueError) as error:
                raise StoreDamagedError(f"{path}: slot {slot} cannot be decoded: {error}") from error
            yield slot, row


def shard_moments(root: Location, recipe: Recipe, view: str, shard: int, slots: NDArray[np.bool_]) -> Moments:
    """Return the moments of the tokens at some slots of a published shard, bool[capacity]."""
    field = fields_of(recipe, view)[0]
    sums = RowSums(field.row_shape, field.dtype, published_code(root, recipe))
    for slot, row in published_rows(root, recipe, field, shard):
        if row is not None and slots[slot]:
            sums.update(row[None])
    return sums.moments()


def describe_shard(
    root: Location,
    recipe: Recipe,
    plan: Plan,
    view: str,
    shard: int,
    *,
    reasons: Mapping[int, str],
    square_error: NDArray[np.float64] | None,
) -> tuple[CommitRecord, Moments]:
    """Return the commit record and moments of a shard whose objects are all published.

    Args:
        root: The store.
        recipe: Its recipe.
        plan: Its plan.
        view: Way the images were shown to the encoder.
        shard: Number of the shard.
        reasons: What is known about slots that have no row.
        square_error: Error of the int8 code over these rows, as whoever else encoded them measured it.
    """
    size = plan.shard_size(shard)
    present = np.ones(recipe.capacity, np.bool_)
    present[size:] = False
    checksums: dict[str, NDArray[np.uint32]] = {}
    offsets: dict[str, NDArray[np.int64]] = {}
    fields = fields_of(recipe, view)
    for field in fields:
        sums = np.zeros(recipe.capacity, np.uint32)
        for slot, row in published_rows(root, recipe, field, shard):
            if row is None:
                present[slot] = False
            else:
                sums[slot] = crc32c(row)
        checksums[field.name] = sums
        if not format_of(recipe).has_row_index:
            offsets[field.name] = scan_extents(root, recipe, field, shard).offsets
    moments = shard_moments(root, recipe, view, shard, present)
    unknown = "the worker that published this shard wrote no row"
    bad = {int(slot): reasons.get(int(slot), unknown) for slot in np.flatnonzero(~present[:size])}
    paths = dict.fromkeys(object_path(recipe, field, shard) for field in fields)
    record = CommitRecord(
        view=view,
        shard=shard,
        num_rows=int(present.sum()),
        objects=tuple(object_record(root, path, recipe.object_digest) for path in paths),
        moments=ObjectRecord.of(moments_path(view, shard), moments.to_bytes()),
        bad=bad,
        crc32c=checksums,
        offsets=offsets,
        square_error=square_error,
        seconds=0.0,
        attempts=0,
    )
    return record, moments
