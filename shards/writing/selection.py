"""Which rows of which finished stores make up a new store, and where they go in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.metadata.plan import NO_LABEL, Plan, SourceRecord
from shards.reading.store import Store


@dataclass(frozen=True)
class Selection:
    """Rows of finished stores in the order of a new plan.

    Attributes:
        stores: Where the rows come from; tokens and images of all have one shape.
        plan: Which image goes where in the new store.
        store_of: For each image of the plan, its store's slot in `stores`, int64[n].
        row_of: For each image of the plan, its row there, int64[n].
    """

    stores: tuple[Store, ...]
    plan: Plan
    store_of: NDArray[np.int64]
    row_of: NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """Some images of one store.

    Attributes:
        store: A finished store.
        images: Their indices in its plan, int64[k].
        labels: The new label of each old one, int64[classes]; None keeps them.
    """

    store: Store
    images: NDArray[np.int64]
    labels: NDArray[np.int64] | None = None

    def records(self) -> list[SourceRecord]:
        """Return the images as a new plan takes them, with their new labels."""
        plan, images = self.store.plan, self.images
        labels = plan.labels[images]
        if self.labels is not None:
            # The entry behind the last is that of label -1.
            labels = np.append(self.labels, NO_LABEL)[labels]
        nbytes = plan.table[
            "nbytes"
        ].to_numpy()  # as listed: the plan of a copy begun before a repair still fits
        columns = (plan.keys[images], labels, plan.uris[images], plan.offsets[images], nbytes[images])
        return [SourceRecord(*values) for values in zip(*(c.tolist() for c in columns), strict=True)]


def every_row(store: Store) -> Selection:
    """Return all images of a store, each in its old slot."""
    plan = store.plan.with_repaired(store.repaired)
    return Selection((store,), plan, np.zeros(plan.num_images, np.int64), plan.rows)


def reshuffled(parts: Sequence[Part], class_names: Sequence[str], num_shards: int, seed: int) -> Selection:
    """Return images assigned to shards as an encode with the same images, shards and seed assigns them.

    Args:
        parts: Images, with no key twice.
        class_names: Name of each new label.
        num_shards: Exact number of shards.
        seed: Seed of the shuffle.

    Raises:
        UsageError: If there are no images, or more shards than images.
    """
    records = [part.records() for part in parts]
    repaired = {key: nbytes for part in parts for key, nbytes in part.store.repaired.items()}
    archives = {uri: archive for part in parts for uri, archive in part.store.plan.archives.items()}
    plan = Plan.build([r for own in records for r in own], class_names, num_shards, seed, archives)
    plan = plan.with_repaired(repaired)
    origin: dict[str, tuple[int, int]] = {}
    for index, (part, own) in enumerate(zip(parts, records, strict=True)):
        rows = part.store.plan.rows[part.images].tolist()
        origin |= {record.key: (index, row) for record, row in zip(own, rows, strict=True)}
    origins = np.array([origin[key] for key in plan.keys], np.int64).reshape(-1, 2)
    stores = tuple(part.store for part in parts)
    return Selection(stores, plan, np.ascontiguousarray(origins[:, 0]), np.ascontiguousarray(origins[:, 1]))
