"""A finished store's rows in another storage type, all of them or a sample, in as many runs as it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.dtypes import storage_type, to_storage
from shards.errors import UsageError
from shards.given_statistics import publish_given
from shards.identity import Recipe
from shards.plan import Plan, SourceRecord
from shards.quantize import Int8Code
from shards.reader import RowReader
from shards.shard_writer import ShardWriter
from shards.store import Store, open_store
from shards.writing import StoreWriter

_BLOCK = 16  # rows copied at a time
_UNKNOWN = "unusable in the store this one was made from"


def recoded_recipe(
    source: Store,
    dtype: str,
    code: Int8Code | None = None,
    *,
    calibration_rows: int = 0,
    code_error: float = 0.0,
) -> Recipe:
    """The recipe of a store with the rows of another.

    Args:
        source: The finished store.
        dtype: The new storage type.
        code: For int8.
        calibration_rows: Images the code was fitted to.
        code_error: Error it was to aim at.
    """
    return dataclasses.replace(
        source.recipe,
        dtype=dtype,
        code=None if code is None else code.digest,
        calibration_rows=calibration_rows,
        code_error=code_error,
    )


def sampled_plan(source: Store, rows: NDArray[np.int64]) -> Plan:
    """A plan of some of a store's rows, in one shard."""
    places = np.searchsorted(source.plan.rows, rows)
    # A sample of a store has no source images of its own; it is read from the store alone.
    records = [
        SourceRecord(key, label, key, 0, 0)
        for key, label in zip(source.plan.keys[places], source.plan.labels[places].tolist(), strict=True)
    ]
    return Plan.build(records, source.class_names, 1, source.recipe.seed)


def recode_store(
    source: Store,
    dst: Path,
    recipe: Recipe,
    plan: Plan,
    code: Int8Code | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Store:
    """Write a store's rows into a new store; run again after an interruption, it continues.

    Args:
        source: The finished store.
        dst: Folder of the new one.
        recipe: See `recoded_recipe`; its views are some of the source's.
        plan: The source's, or a `sampled_plan`.
        code: For int8.
        progress: Called with the shards finished so far and the shards in all.

    Raises:
        UsageError: If the tokens are int8 already: what a code has lost, another cannot bring back.
        StoreDamagedError: If a row of the source is damaged.
    """
    if source.code is not None:
        raise UsageError(f"{source.path} holds int8 tokens; recode the store they were made from")
    writer = StoreWriter.create_or_continue(dst, recipe, plan, code)
    publish_given(writer.path, source.given_statistics)
    row_of = dict(zip(source.plan.keys, source.plan.rows.tolist(), strict=True))
    old_rows = np.full(writer.recipe.num_rows, -1)
    old_rows[plan.rows] = [row_of[key] for key in plan.keys]
    old_rows[~np.isin(old_rows, source.valid_rows)] = -1
    pending = writer.pending()
    total = len(writer.recipe.views) * writer.recipe.num_shards
    for done, (view, shard) in enumerate(pending, start=total - len(pending) + 1):
        readers = {name: source.reader(view, name, verify="always") for name in writer.recipe.fields(view)}
        rows = writer.plan.rows_of(shard)
        with writer.shard(view, shard) as output:
            _copy(output, source, readers, old_rows[rows.start : rows.stop], writer)
            output.publish()
        if progress is not None:
            progress(done, total)
    writer.finalize(source.manifest.provenance)
    return open_store(dst)


def _copy(
    output: ShardWriter,
    source: Store,
    readers: dict[str, RowReader],
    old_rows: NDArray[np.int64],
    writer: StoreWriter,
) -> None:
    for place in np.flatnonzero(old_rows < 0).tolist():
        output.quarantine(place, _UNKNOWN)
    for places in _blocks(old_rows >= 0):
        rows = old_rows[places.start : places.stop]
        arrays = {}
        for name, reader in readers.items():
            arrays[name] = np.empty((len(rows), *reader.row_shape), reader.dtype)
            reader.read(rows, arrays[name])
        values = source.decode(arrays["tokens"])
        if writer.code is None:
            arrays["tokens"] = to_storage(values, storage_type(writer.recipe.dtype))
        else:
            arrays["tokens"], square_errors = writer.code.encode_rows(values)
            for square_error in square_errors:
                output.add_square_error(square_error)
        output.write_block(places.start, arrays)


def _blocks(present: NDArray[np.bool_]) -> Iterator[range]:
    """The places that hold rows, in runs of at most `_BLOCK`."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], present, [False]])))
    for start, stop in edges.reshape(-1, 2).tolist():
        for first in range(start, stop, _BLOCK):
            yield range(first, min(first + _BLOCK, stop))
