"""The same rows in another form: row for row and bit for bit, in as many runs as it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.commit import CommitRecord
from shards.errors import StoreDamagedError, UsageError
from shards.finalize import read_commits
from shards.given_statistics import publish_given
from shards.layout import fields_of
from shards.manifest import Manifest
from shards.reader import RowReader
from shards.shard_writer import ShardWriter
from shards.store import Store, open_store
from shards.verify import verify_store
from shards.writing import StoreWriter

_BLOCK = 16  # rows copied at a time


def convert_store(
    src: Path | str,
    dst: Path | str,
    *,
    format: str,  # noqa: A002 - the setting's name everywhere else
    compression: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Write a store's rows into a new store of another form or compression.

    Run again after an interruption, it continues with the shards that are missing. Every row is checked
    against its checksum when it is read, and the finished store is read back and verified before this
    returns.

    Args:
        src: A finished store.
        dst: Folder of the new one.
        format: ``zarr`` or ``webdataset``.
        compression: None, ``blosc`` or ``zstd``.
        progress: Called with the shards finished so far and the shards in all.

    Raises:
        UsageError: If the new store would be the same, or a store cannot have this form.
        StoreDamagedError: If a row of ``src`` is damaged, or ``dst`` does not read back as it was written.
    """
    source = open_store(src)
    recipe = dataclasses.replace(source.recipe, format=format, compression=compression)
    if recipe.id == source.recipe.id:
        raise UsageError(f"{src} is of format {format} and compression {compression} already")
    writer = StoreWriter.create_or_continue(Path(dst), recipe, source.plan, source.code)
    publish_given(writer.path, source.given_statistics)
    commits = read_commits(source.path, source.recipe)
    total = len(recipe.views) * recipe.num_shards
    pending = writer.pending()
    readers = {
        (view, field.name): source.reader(view, field.name, verify="always")
        for view in recipe.views
        for field in fields_of(recipe, view)
    }
    for done, (view, shard) in enumerate(pending, start=total - len(pending) + 1):
        with writer.shard(view, shard) as output:
            own = {name: reader for (of, name), reader in readers.items() if of == view}
            _copy_shard(output, source, own, commits[view, shard])
        if progress is not None:
            progress(done, total)
    manifest = writer.finalize(source.manifest.provenance)
    problems = verify_store(dst)
    if problems:
        raise StoreDamagedError(f"{dst} does not read back as it was written: {problems[0]}")
    _require_same_rows(source, open_store(dst))
    return manifest


def _copy_shard(
    output: ShardWriter, source: Store, readers: dict[str, RowReader], record: CommitRecord
) -> None:
    for place, reason in record.bad.items():
        output.quarantine(place, reason)
    for places in _runs(source.plan.shard_size(record.shard), record.bad):
        rows = record.shard * source.capacity + np.arange(places.start, places.stop)
        arrays: dict[str, NDArray[Any]] = {}
        for name, reader in readers.items():
            arrays[name] = np.empty((len(rows), *reader.row_shape), reader.dtype)
            reader.read(rows, arrays[name])
        output.write_block(places.start, arrays)
    if record.square_error is not None and record.num_rows:
        output.add_square_error(record.square_error)
    output.publish()


def _runs(size: int, bad: dict[int, str]) -> Iterator[range]:
    """The places that hold rows, in runs of at most `_BLOCK`."""
    start = 0
    for place in [*sorted(bad), size]:
        for first in range(start, place, _BLOCK):
            yield range(first, min(first + _BLOCK, place))
        start = place + 1


def _require_same_rows(source: Store, copy: Store) -> None:
    columns = ["row", "key", "label", "valid", "reason"]
    columns += [name for name in source.index.column_names if name.endswith("/crc32c")]
    if not source.index.table(*columns).equals(copy.index.table(*columns)):
        raise StoreDamagedError(
            f"{copy.path} does not hold the rows of {source.path}; remove it and convert again"
        )
