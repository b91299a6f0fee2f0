"""What a store held before it was extended, and how its images are spread over the shards of all stages.

A store begins with n images in exactly N shards. Each extension puts further images into further shards of the same
capacity ⌈n / N⌉, full but for its last one; nothing that was there before gets another row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Stage:
    """A store before one of its extensions.

    Attributes:
        num_images: Images it had.
        num_shards: Shards it had.
        num_classes: Classes it had.
        source_digest: Digest of its images and classes (`shards.metadata.plan.Plan.source_digest`).
    """

    num_images: int
    num_shards: int
    num_classes: int
    source_digest: str

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON values."""
        return dataclasses.asdict(self)


def check_stages(num_images: int, num_shards: int, earlier: Sequence[Stage]) -> None:
    """Refuse numbers of images and shards of which a later stage's do not follow from those of the one before.

    Raises:
        ValueError: If they do not.
    """
    if not earlier:
        return
    images, shards = earlier[0].num_images, earlier[0].num_shards
    if not 1 <= shards <= images:
        raise ValueError(f"a store of {images} images cannot have been begun in {shards} shards")
    capacity = shard_capacity(images, shards)
    ends = [*((stage.num_images, stage.num_shards) for stage in earlier[1:]), (num_images, num_shards)]
    for end_images, end_shards in ends:
        added = end_images - images
        if added < 1 or end_shards - shards != -(-added // capacity):
            raise ValueError(
                f"an extension from {images} images in {shards} shards to {end_images} in {end_shards} is not one "
                f"of full shards of {capacity}"
            )
        images, shards = end_images, end_shards


def shard_capacity(num_images: int, num_shards: int, earlier: Sequence[Stage] = ()) -> int:
    """Return the number of rows of every shard, spare ones included: ⌈n / N⌉ of what the store began with."""
    if earlier:
        num_images, num_shards = earlier[0].num_images, earlier[0].num_shards
    return -(-num_images // num_shards)


def shard_sizes(num_images: int, num_shards: int, earlier: Sequence[Stage] = ()) -> NDArray[np.int64]:
    """Return images in each shard, int64[num_shards], of numbers that `check_stages` takes."""
    ends = [*((stage.num_images, stage.num_shards) for stage in earlier), (num_images, num_shards)]
    (images, shards), *later = ends
    base, larger = divmod(images, shards)
    sizes = [np.full(shards, base, np.int64)]
    sizes[0][:larger] += 1
    capacity = shard_capacity(images, shards)
    for end_images, end_shards in later:
        sizes.append(np.full(end_shards - shards, capacity, np.int64))
        sizes[-1][-1] = end_images - images - capacity * (end_shards - shards - 1)
        images, shards = end_images, end_shards
    return np.concatenate(sizes)


def planned_rows(num_images: int, num_shards: int, earlier: Sequence[Stage] = ()) -> NDArray[np.int64]:
    """Return the row of each image, ascending, int64[n]: every row that is not spare."""
    capacity = shard_capacity(num_images, num_shards, earlier)
    rows = np.arange(capacity * num_shards, dtype=np.int64)
    shard, slot = np.divmod(rows, capacity)
    return rows[slot < shard_sizes(num_images, num_shards, earlier)[shard]]
