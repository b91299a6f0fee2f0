"""Image files that were mended after the plan was made, and have another size now; the plan itself never changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from shards.metadata.commit import CommitRecord
from shards.metadata.plan import Plan, SourceRecord


def mended_images(plan: Plan, commits: Mapping[tuple[str, int], CommitRecord]) -> dict[str, int]:
    """Size in bytes by key of each image that commit records name as mended; of several, the last view's counts.

    Args:
        plan: The store's.
        commits: Some of its records, by view and shard, in order of view.
    """
    sizes: dict[str, int] = {}
    for (_, shard), record in commits.items():
        if record.mended:
            records = plan.records_of(shard)
            sizes |= {records[place].key: nbytes for place, nbytes in record.mended.items()}
    return sizes


def as_mended(records: Iterable[SourceRecord], sizes: Mapping[str, int]) -> list[SourceRecord]:
    """Images with the sizes they were mended to, which are given by key."""
    return [
        dataclasses.replace(record, nbytes=sizes[record.key]) if record.key in sizes else record
        for record in records
    ]
