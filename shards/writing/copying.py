"""Rows of finished stores into a new store: one engine for reshard, subset, merge and convert.

The new store is written like any other, shard by shard through `StoreWriter`: it may be killed at any moment and
continued, and the first publication of a shard wins. Every row is compared with its checksum when it is read, every
object is read back before the manifest is written, and the stores that are read are only ever read.
"""

from __future__ import annotations

import dataclasses
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import StoreDamagedError
from shards.metadata.identity import Recipe
from shards.metadata.layout import Field, fields_of
from shards.metadata.manifest import Manifest
from shards.metadata.token_statistics import GivenStatistics, publish_given
from shards.reading.store import Store
from shards.storage.digests import BLAKE3
from shards.storage.location import Location
from shards.values.quantize import Int8Code
from shards.writing.finalize import read_commits
from shards.writing.published import object_record
from shards.writing.selected_rows import Block, SelectedRows
from shards.writing.selection import Selection
from shards.writing.shard_writer import ShardWriter
from shards.writing.store_writer import StoreWriter

_BLOCK_BYTES = 1 << 24  # rows read ahead of those being written

RowsDone = Callable[[int], object]
"""Called with the number of rows that have been written since the last call."""


def copied_recipe(selection: Selection, **changes: Any) -> Recipe:
    """Return the recipe of a new store of others' rows: the first store's, but for rows, shards and ``changes``."""
    changes = {**selection.plan.recipe_values(), "object_digest": BLAKE3, **changes}
    return dataclasses.replace(selection.stores[0].recipe, **changes)


def begin_copy(
    selection: Selection, out: Location, recipe: Recipe, code: Int8Code | None = None
) -> tuple[StoreWriter, int]:
    """Begin or continue the store that rows are copied into.

    Args:
        selection: The rows.
        out: Folder of the new store.
        recipe: See `copied_recipe`; its views are some of the stores', its tokens may have another type.
        code: For int8.

    Returns:
        The new store's writer, and the rows, counted in each view, that are still to be written.
    """
    writer = StoreWriter.create_or_continue(out, recipe, selection.plan, code)
    publish_given(writer.path, _common_statistics(selection.stores))
    return writer, sum(writer.plan.shard_size(shard) for _, shard in writer.pending())


def copy_rows(
    selection: Selection, writer: StoreWriter, provenance: dict[str, str], progress: RowsDone | None = None
) -> Manifest:
    """Write the rows that are still to come, check what was written, and finish the new store.

    Args:
        selection: The rows.
        writer: See `begin_copy`.
        provenance: What the command wants recorded beside the digests of the stores read.
        progress: Told of every row.

    Raises:
        StoreDamagedError: If a row of a store is damaged, or the new one does not read back as it was written.
    """
    if not writer.finished():
        rows = SelectedRows(selection, writer)
        for view, shard in writer.pending():
            with writer.shard(view, shard) as output:
                _copy_shard(rows, output, progress)
                output.publish()
        _check(writer, rows)
    return writer.finalize(
        {
            **(selection.stores[0].manifest.provenance if len(selection.stores) == 1 else {}),
            **provenance,
            "copied from": " ".join(store.manifest.digest for store in selection.stores),
        }
    )


def _common_statistics(stores: tuple[Store, ...]) -> GivenStatistics | None:
    """Return the file that all stores are normalised by in place of their own statistics, if there is one."""
    given = [store.given_statistics for store in stores]
    same = {None if one is None else one.sha256 for one in given}
    return given[0] if len(same) == 1 else None


def _copy_shard(rows: SelectedRows, output: ShardWriter, progress: RowsDone | None) -> None:
    bad = rows.bad(output.view, output.shard)
    size = rows.writer.plan.shard_size(output.shard)
    present = np.ones(size, np.bool_)
    present[list(bad)] = False
    for slot, reason in bad.items():
        output.quarantine(slot, reason)
    for block in _read_ahead(rows, output.view, output.shard, present):
        output.write_block(block.first_slot, block.arrays)
        for square_error in () if block.square_errors is None else block.square_errors:
            output.add_square_error(square_error)
        if progress is not None:
            progress(len(block.arrays["tokens"]))
    if rows.writer.code is not None and present.any():
        old = rows.old_error(output.view, output.shard, present)
        if old is None:
            output.leave_error_unknown()
        else:
            output.add_square_error(old)
    if progress is not None and bad:
        progress(len(bad))


def _read_ahead(rows: SelectedRows, view: str, shard: int, present: NDArray[np.bool_]) -> Iterator[Block]:
    """Yield the blocks of a shard in order; one is read while the one before is written."""
    row_nbytes = sum(field.row_nbytes for field in fields_of(rows.writer.recipe, view))
    start = rows.slots(shard).start
    reading: deque[Future[Block]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="copy") as pool:
        for run in _runs(present, max(1, _BLOCK_BYTES // row_nbytes)):
            reading.append(pool.submit(rows.block, view, start + run.start, start + run.stop))
            if len(reading) > 1:
                yield reading.popleft().result()
        while reading:
            yield reading.popleft().result()


def _runs(present: NDArray[np.bool_], longest: int) -> Iterator[range]:
    """Yield the slots that hold rows, in runs of at most ``longest``."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], present, [False]])))
    for start, stop in edges.reshape(-1, 2).tolist():
        for first in range(start, stop, longest):
            yield range(first, min(first + longest, stop))


def _check(writer: StoreWriter, rows: SelectedRows) -> None:
    """Read every shard back from the disk, and compare the checksums of rows that were not recoded with the old."""
    commits = read_commits(writer.path, writer.recipe)
    listed = [record for commit in commits.values() for record in commit.objects]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="check") as pool:
        for expected, found in zip(
            listed,
            pool.map(lambda record: object_record(writer.path, record.path, record.algorithm), listed),
            strict=True,
        ):
            if found != expected:
                raise StoreDamagedError(
                    f"{writer.path / expected.path} does not read back as it was written; remove {writer.path}, "
                    "look after the disk and copy again"
                )
    for view in writer.recipe.views:
        for field in fields_of(writer.recipe, view):
            by_shard = [commits[view, shard].crc32c[field.name] for shard in range(writer.recipe.num_shards)]
            _check_rows(rows, field, np.concatenate(by_shard))


def _check_rows(rows: SelectedRows, field: Field, written: NDArray[np.uint32]) -> None:
    """Compare the checksum of each row of the new store, uint32[num_rows], with that of the row it was copied from."""
    present = np.ones(len(written), np.bool_)
    for shard in range(rows.writer.recipe.num_shards):
        start = rows.slots(shard).start
        present[[start + slot for slot in rows.bad(field.view, shard)]] = False
    for index, store in enumerate(rows.stores):
        if field.name == "tokens" and not rows.as_they_are[index]:
            continue
        mine = present & (rows.store_of == index)
        old_rows = rows.row_of[mine]
        wrong = np.flatnonzero(written[mine] != store.index.checksums(field.path)[old_rows])
        if len(wrong):
            raise StoreDamagedError(
                f"{rows.writer.path} does not hold row {old_rows[wrong[0]]} of {field.path} of {store.path}; "
                "remove it and copy again"
            )
