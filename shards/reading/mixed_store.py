"""Several finished stores read as one; see `shards.reading.mixture` for the order of their rows.

Rows are numbered over all stores, one store behind the other; labels are united by the names of the classes. What the
stores share – encoder, storage type, int8 code, size of images – is that of the first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import IdentityMismatchError, UsageError
from shards.metadata.class_names import united_classes
from shards.metadata.identity import Recipe, digest_of
from shards.metadata.token_statistics import Statistics
from shards.reading.mixture import MixtureOrder, Phase, Unit
from shards.reading.order import RowOrder
from shards.reading.reader import Numbers, RowReader, Verify
from shards.reading.shard_file import ReadMode
from shards.reading.store import Store
from shards.values.quantize import Int8Code

_ALIKE = ("dtype", "image_size", "code")
"""Settings of the recipes that stores must share to be read as one, beside the encoder."""


class MixedStore(Store):
    """Several stores of one encoder as one store.

    Args:
        stores: The stores, two or more.
        phases: Their weights, and from which step on they hold.
        unit: What a store is drawn for: every sample, or every step.

    Raises:
        IdentityMismatchError: If the stores' encoders, storage types, image sizes or given statistics differ.
        UsageError: If there are other weights than stores, or a class name has two meanings.
    """

    def __init__(self, stores: Sequence[Store], phases: Sequence[Phase], unit: Unit = "sample") -> None:
        self.stores = tuple(stores)
        self.phases, self.unit = tuple(phases), unit
        for phase in phases:
            phase.units()
            if len(phase.weights) != len(stores):
                raise UsageError(f"{len(stores)} stores need {len(stores)} weights, got {len(phase.weights)}")
        for other in stores[1:]:
            _require_alike(stores[0], other)
        ends = np.cumsum([store.num_rows for store in stores])
        self._bases = np.concatenate([[0], ends[:-1]])
        self._num_rows = int(ends[-1])
        classes = [(str(store.path), store.class_names, store.plan.labels) for store in stores]
        self._class_names, self._new_labels = united_classes(classes)

    @property
    def path(self) -> Any:  # type: ignore[override]
        """There is no folder that holds all of it.

        Raises:
            UsageError: Always; the message names the stores.
        """
        raise UsageError(f"this needs one store, and several are mixed: {self}; name one of them")

    def __str__(self) -> str:
        return ", ".join(str(store.path) for store in self.stores)

    @cached_property
    def id(self) -> str:
        """Digest of the stores' recipes and how they are mixed."""
        return self._digest([store.id for store in self.stores])

    def _digest(self, ids: Sequence[str]) -> str:
        phases = [[phase.first_step, list(phase.weights)] for phase in self.phases]
        return digest_of({"stores": ids, "phases": phases, "unit": self.unit})

    def as_known_by(self, id: str) -> MixedStore | None:  # noqa: A002 - see `Store.as_known_by`
        """See `Store.as_known_by`: each of the stores as it is or was before something was added to it."""
        recipes = [store.manifest.recipe for store in self.stores]
        states = [{recipe.at_stage(*state).id: state for state in recipe.states()} for recipe in recipes]
        for ids in itertools.product(*states):
            if self._digest(ids) == id:
                parts = zip(self.stores, states, ids, strict=True)
                stores = [store.at_stage(*known[own]) for store, known, own in parts]
                return MixedStore(stores, self.phases, self.unit)
        return None

    @property
    def added_fields(self) -> tuple[str, ...]:
        """None: a field is read beside the tokens of one store."""
        return ()

    @property
    def images_since(self) -> int:
        """See `Store.images_since`."""
        return sum(store.images_since for store in self.stores)

    @property
    def classes_since(self) -> tuple[str, ...]:
        """See `Store.classes_since`."""
        names = dict.fromkeys(name for store in self.stores for name in store.classes_since)
        return tuple(name for name in names if name not in self.class_names)

    @property
    def views_since(self) -> tuple[str, ...]:
        """See `Store.views_since`: views that all stores have on the disk, and this one has not."""
        now = set.intersection(*(set(store.manifest.recipe.views) for store in self.stores))
        return tuple(
            view for view in self.stores[0].manifest.recipe.views if view in now and view not in self.views
        )

    @property
    def recipe(self) -> Recipe:
        """The first store's recipe, for what all of them share."""
        return self.stores[0].recipe

    @property
    def is_remote(self) -> bool:
        """Whether one of them is on a server."""
        return any(store.is_remote for store in self.stores)

    @property
    def num_rows(self) -> int:
        """Rows of all stores, spare ones included."""
        return self._num_rows

    @property
    def views(self) -> tuple[str, ...]:
        """Views that all stores have."""
        return tuple(
            view for view in self.stores[0].views if all(view in store.views for store in self.stores)
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each label: the first store's, then those that others add."""
        return self._class_names

    @cached_property
    def labels(self) -> NDArray[np.int32]:
        """Class of each row among the united classes, int32[num_rows]; -1 where there is none."""
        parts = []
        for store, new in zip(self.stores, self._new_labels, strict=True):
            known = store.labels >= 0
            parts.append(np.where(known, new[np.where(known, store.labels, 0)] if len(new) else -1, -1))
        return np.concatenate(parts).astype(np.int32)

    @cached_property
    def valid_rows(self) -> NDArray[np.int64]:
        """Rows that hold an image in every view, ascending, int64[k]."""
        return np.concatenate([s.valid_rows + base for s, base in zip(self.stores, self._bases, strict=True)])

    @property
    def code(self) -> Int8Code | None:
        """What the int8 numbers of the tokens encode; None for other storage types."""
        return self.stores[0].code

    def statistics(self, views: Iterable[str] | None = None, *, exact: bool = False) -> Statistics:
        """Return the mean and variance of the stream's tokens: those of the stores, weighted as in the first phase.

        Where files gave all stores the same statistics, these.

        Args:
            views: Some of `views`; by default all.
            exact: The tokens' own, also where the stores were given others.
        """
        views = self.views if views is None else tuple(views)
        if not exact and self.stores[0].given_statistics is not None:
            return self.stores[0].given_statistics.statistics
        weights = np.array(self.phases[0].weights) / sum(self.phases[0].weights)
        parts = [store.statistics(views, exact=exact) for store in self.stores]
        mean = sum(w * part.mean for w, part in zip(weights, parts, strict=True))
        spread = [w * (p.variance + (p.mean - mean) ** 2) for w, p in zip(weights, parts, strict=True)]
        return Statistics(np.asarray(mean), np.asarray(sum(spread)), sum(part.count for part in parts))

    def order(
        self, rows: NDArray[np.int64], *, seed: int, group: int | None, global_batch_size: int
    ) -> MixtureOrder:
        """Return the stream of these rows; see `shards.reading.mixture`."""
        owners = np.searchsorted(self._bases, rows, side="right") - 1
        orders = [
            RowOrder(rows[owners == number] - base, seed, group, capacity=store.capacity)
            for number, (store, base) in enumerate(zip(self.stores, self._bases, strict=True))
        ]
        return MixtureOrder(
            orders,
            self._bases.tolist(),
            self.phases,
            unit=self.unit,
            seed=seed,
            global_batch_size=global_batch_size,
        )

    def reader(
        self, view: str, field: str, *, mode: ReadMode = "auto", verify: Verify = "first"
    ) -> RowReader:
        """Return a reader of one field of one view of all stores."""
        return _MixedReader(
            [store.reader(view, field, mode=mode, verify=verify) for store in self.stores], self._bases
        )


class _MixedReader:
    """Reads rows numbered over all stores."""

    def __init__(self, readers: Sequence[RowReader], bases: NDArray[np.int64]) -> None:
        self.row_shape, self.dtype, self.logical_dtype = (
            readers[0].row_shape,
            readers[0].dtype,
            readers[0].logical_dtype,
        )
        self._readers, self._bases = readers, bases

    def read(self, rows: Numbers, out: NDArray[Any], at: Numbers | None = None) -> None:
        """See `shards.reading.reader.RowReader.read`."""
        wanted = np.asarray(rows, np.int64)
        targets = np.arange(len(wanted)) if at is None else np.asarray(at)
        owners = np.searchsorted(self._bases, wanted, side="right") - 1
        for number, reader in enumerate(self._readers):
            chosen = np.flatnonzero(owners == number)
            if len(chosen):
                reader.read(wanted[chosen] - self._bases[number], out, targets[chosen])


def _require_alike(first: Store, other: Store) -> None:
    first.recipe.encoder.require_same(other.recipe.encoder, what=str(other.path))
    differences = [
        f"{name} is {getattr(first.recipe, name)!r}, in {other.path} {getattr(other.recipe, name)!r}"
        for name in _ALIKE
        if getattr(first.recipe, name) != getattr(other.recipe, name)
    ]
    given, others = first.given_statistics, other.given_statistics
    if (given is None) != (others is None) or (
        given is not None
        and others is not None
        and not (
            np.array_equal(given.statistics.mean, others.statistics.mean)
            and np.array_equal(given.statistics.variance, others.statistics.variance)
        )
    ):
        differences.append(
            f"the statistics that files gave to {first.path} and {other.path} are not the same"
        )
    if not set(first.views) & set(other.views):
        differences.append(f"{first.path} and {other.path} have no view in common")
    if differences:
        raise IdentityMismatchError(
            f"stores that are read as one must be of one kind: {'; '.join(differences)}; "
            "convert or encode one of them like the other"
        )
