"""`pipeline encode --retry-quarantined`: images that could not be used are tried again.

The shards of those that can be decoded now are withdrawn, as `pipeline verify --withdraw` removes damaged ones; the
ordinary encode then makes these shards and finishes the store. Killed at any instant, the same command continues.
"""

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np

from pipeline.console import log
from pipeline.settings.config import EncodeConfig
from pipeline.sources.crop_sources import CropSource, crop_source
from shards import (
    BadImageError,
    SourceRecord,
    StoreWriter,
    UndecodableImageError,
    usable_cores,
    withdraw_repaired,
)
from shards.writing.finalize import Commits, found_commits


def withdraw_quarantined(config: EncodeConfig, writer: StoreWriter) -> None:
    """Remove every shard that lacks the row of an image which can be decoded now.

    Args:
        config: Settings of the encode; the source's images are read as it would read them.
        writer: The store, which nobody else reads or writes.
    """
    commits = found_commits(writer.path, writer.recipe)
    bad = _bad_images(writer, commits)
    sizes = _decodable(config, writer, list(bad.values()))
    repaired = {row for row, record in bad.items() if record.key in sizes}
    capacity = writer.recipe.capacity
    shards = [
        (view, shard)
        for (view, shard), commit in commits.items()
        if not repaired.isdisjoint(shard * capacity + slot for slot in commit.bad)
    ]
    log(f"{len(repaired)} of {len(bad)} unusable images can be decoded now")
    if shards:
        log(f"{writer.path} is unfinished until {len({s for _, s in shards})} shards are encoded again")
        withdraw_repaired(writer.path, shards, sizes)


def _bad_images(writer: StoreWriter, commits: Commits) -> dict[int, SourceRecord]:
    """Return the images, by row, that lack a row in some view of a published shard."""
    bad: dict[int, SourceRecord] = {}
    for shard in sorted({shard for (_, shard), commit in commits.items() if commit.bad}):
        records = writer.plan.records_of(shard)
        slots = {slot for (_, own), commit in commits.items() if own == shard for slot in commit.bad}
        bad |= {shard * writer.recipe.capacity + slot: records[slot] for slot in sorted(slots)}
    return bad


def _decodable(config: EncodeConfig, writer: StoreWriter, records: list[SourceRecord]) -> Mapping[str, int]:
    """Return size in bytes now, by key, of those images that can be decoded."""
    with (
        closing(crop_source(config, writer.recipe, writer.recipe.views, writer.plan)) as source,
        ThreadPoolExecutor(usable_cores(), thread_name_prefix="decode") as pool,
    ):
        found = pool.map(lambda record: _size_if_decodable(source, record, writer.recipe.views), records)
        return {record.key: size for record, size in zip(records, found, strict=True) if size is not None}


def _size_if_decodable(source: CropSource, record: SourceRecord, views: tuple[str, ...]) -> int | None:
    crops = source.crops
    out = np.empty((len(crops.names), crops.size, crops.size, 3), np.uint8)
    try:
        now = dataclasses.replace(record, nbytes=source.current_size(record))
        source.cut(source.read(now, views), now, views, out)
    except (BadImageError, UndecodableImageError):
        return None
    return now.nbytes
