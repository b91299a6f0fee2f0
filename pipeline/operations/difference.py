"""In what two finished stores differ: recipe, rows, bytes and numbers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.operations.facts import bytes_by_part
from shards import RowReader, Store, even_spread
from shards.metadata.layout import fields_of

_BLOCK = 64  # rows compared at a time

Progress = Callable[[int, int], None]
"""Called with the rows of a field compared so far and the rows to compare."""


@dataclass(frozen=True, kw_only=True)
class RowDifference:
    """Images by key, each list sorted.

    Attributes:
        common: Images of both stores.
        only_a: Images of the first alone.
        only_b: Images of the second alone.
        other_class: Common images with another label or class name.
        valid_only_a: Common images that only the first has a row of.
        valid_only_b: Common images that only the second has a row of.
    """

    common: int
    only_a: list[str]
    only_b: list[str]
    other_class: list[str]
    valid_only_a: list[str]
    valid_only_b: list[str]

    def lists(self) -> dict[str, list[str]]:
        """Return the lists by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, list)}


@dataclass(frozen=True, kw_only=True)
class NumberDifference:
    """By how much the tokens of rows that differ do so.

    Attributes:
        compared: Rows that were read: all that differ, or a sample of them.
        largest: Largest difference of each channel, float64[D].
        mean: Mean absolute difference of each channel, float64[D].
        std: Standard deviation of each channel in the first store, float64[D], to judge them by.
    """

    compared: int
    largest: NDArray[np.float64]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class FieldDifference:
    """One array that both stores have.

    Attributes:
        rows: Images that are valid in both stores.
        differing: Those whose bytes differ, by their checksums; all, where the numbers are stored in other types.
        numbers: By how much; None for images, where no row differs, and where shapes do.
        shapes: Shape of a row in each store, where it is not the same.
    """

    rows: int
    differing: int
    numbers: NumberDifference | None = None
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None


@dataclass(frozen=True, kw_only=True)
class StoreDifference:
    """Everything two stores differ in.

    Attributes:
        recipe: A line for each setting.
        added: A line for each field that was added to one of them alone, or of another encoder.
        statistics: Where each store's readers have their statistics from, if that differs.
        rows: Images.
        nbytes: Bytes by part of the store, (first, second), whether they differ or not.
        fields: Arrays that both stores have, by path.
    """

    recipe: list[str]
    added: list[str]
    statistics: tuple[str, str] | None
    rows: RowDifference
    nbytes: dict[str, tuple[int, int]]
    fields: dict[str, FieldDifference]

    @property
    def same(self) -> bool:
        """Whether both stores say the same: recipe, images, statistics, and every row bit for bit."""
        rows = any(self.rows.lists().values())
        fields = any(part.differing or part.shapes for part in self.fields.values())
        return not (self.recipe or self.added or self.statistics or rows or fields)


def compare_stores(
    a: Store, b: Store, *, rows: int | None, progress: Progress | None = None
) -> StoreDifference:
    """Compare two stores image by image.

    Which rows differ is known of all of them, from the checksums in the index; by how much, from reading them.

    Args:
        a: One finished store.
        b: The other.
        rows: Rows to read for a field, spread evenly over those that differ; None reads them all.
        progress: Told how far it is.

    Raises:
        StoreDamagedError: If a row that is read is not the one that was written.
    """
    row_a, row_b = (dict(zip(s.plan.keys.tolist(), s.plan.rows.tolist(), strict=True)) for s in (a, b))
    common = sorted(row_a.keys() & row_b.keys())
    rows_a, rows_b = (np.array([of[key] for key in common], np.int64) for of in (row_a, row_b))
    valid_a, valid_b = np.isin(rows_a, a.valid_rows), np.isin(rows_b, b.valid_rows)

    def named(which: NDArray[np.bool_]) -> list[str]:
        return [common[i] for i in np.flatnonzero(which)]

    both = valid_a & valid_b
    order = np.argsort(rows_a[both])  # neighbours in the first store are read together
    pair = _Pair(a, b, rows_a[both][order], rows_b[both][order], rows, progress)
    return StoreDifference(
        recipe=a.recipe.diff(b.recipe),
        added=_added_difference(a, b),
        statistics=_given_difference(a, b),
        rows=RowDifference(
            common=len(common),
            only_a=sorted(row_a.keys() - row_b.keys()),
            only_b=sorted(row_b.keys() - row_a.keys()),
            other_class=named(_classes(a, rows_a) != _classes(b, rows_b)),
            valid_only_a=named(valid_a & ~valid_b),
            valid_only_b=named(valid_b & ~valid_a),
        ),
        nbytes=_bytes_of_both(a, b),
        fields={
            f"{view}/{field.name}": pair.compare(view, field.name)
            for view in a.views
            if view in b.views
            for field in fields_of(a.recipe, view)
            if field.name in b.recipe.fields(view)
        },
    )


def _bytes_of_both(a: Store, b: Store) -> dict[str, tuple[int, int]]:
    of_a, of_b = bytes_by_part(a), bytes_by_part(b)
    return {name: (of_a[name], of_b[name]) for name in sorted(of_a | of_b)}


def _classes(store: Store, rows: NDArray[np.int64]) -> NDArray[np.str_]:
    """Return number and name of each row's class as one string; empty without a class."""
    labels, of_row = np.unique(store.labels[rows], return_inverse=True)
    words = [f"{label} {store.class_name(label)}" if label >= 0 else "" for label in labels.tolist()]
    return np.array(words, np.str_)[of_row]


def _added_difference(a: Store, b: Store) -> list[str]:
    of_a, of_b = a.manifest.fields, b.manifest.fields
    return [
        f"{name} is of encoder {of_a.get(name, 'none')}, the other has {of_b.get(name, 'none')}"
        for name in sorted(of_a | of_b)
        if of_a.get(name) != of_b.get(name)
    ]


def _given_difference(a: Store, b: Store) -> tuple[str, str] | None:
    given_a, given_b = (
        "its own tokens" if given is None else f"{given.name}, SHA-256 {given.sha256}"
        for given in (a.given_statistics, b.given_statistics)
    )
    same = given_a.rpartition(" ")[2] == given_b.rpartition(" ")[2]
    return None if same else (given_a, given_b)


class _Pair:
    """The images that are valid in two stores.

    Args:
        a: One store.
        b: The other.
        rows_a: Their rows in the first, int64[k].
        rows_b: Their rows in the second, int64[k].
        most: Rows to read for a field; None for all.
        progress: Told how far reading is.
    """

    def __init__(
        self,
        a: Store,
        b: Store,
        rows_a: NDArray[np.int64],
        rows_b: NDArray[np.int64],
        most: int | None,
        progress: Progress | None,
    ) -> None:
        self._stores = (a, b)
        self._rows = (rows_a, rows_b)
        self._most = most
        self._progress = progress

    def compare(self, view: str, name: str) -> FieldDifference:
        """Return what differs in one field."""
        readers = [store.reader(view, name) for store in self._stores]
        count = len(self._rows[0])
        shapes = (readers[0].row_shape, readers[1].row_shape)
        if shapes[0] != shapes[1]:
            return FieldDifference(rows=count, differing=count, shapes=shapes)
        differing = self._differing(view, name)
        numbers = None
        if name == "tokens" and len(differing):
            numbers = self._read(view, readers, self._sampled(differing))
        return FieldDifference(rows=count, differing=len(differing), numbers=numbers)

    def _differing(self, view: str, name: str) -> NDArray[np.int64]:
        """Return the slots of the rows whose stored bytes are not the same."""
        a, b = self._stores
        if name == "tokens" and (a.recipe.dtype, a.recipe.code) != (b.recipe.dtype, b.recipe.code):
            return np.arange(len(self._rows[0]))
        checksums = [store.index.checksums(f"{view}/{name}") for store in self._stores]
        return np.flatnonzero(checksums[0][self._rows[0]] != checksums[1][self._rows[1]])

    def _sampled(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        return slots if self._most is None else slots[even_spread(self._most, len(slots))]

    def _read(self, view: str, readers: list[RowReader], slots: NDArray[np.int64]) -> NumberDifference:
        a = self._stores[0]
        largest, total = np.zeros(a.width), np.zeros(a.width)
        for start in range(0, len(slots), _BLOCK):
            block = slots[start : start + _BLOCK]
            one, other = (
                _numbers(store, reader, rows[block])
                for store, reader, rows in zip(self._stores, readers, self._rows, strict=True)
            )
            gap = np.abs(one - other)
            largest = np.maximum(largest, gap.max(axis=(0, 1)))
            total += gap.sum(axis=(0, 1))
            if self._progress is not None:
                self._progress(start + len(block), len(slots))
        exact = a.statistics((view,), exact=True)
        return NumberDifference(
            compared=len(slots),
            largest=largest,
            mean=total / (len(slots) * a.num_tokens),
            std=np.sqrt(exact.variance.mean(axis=(1, 2))),
        )


def _numbers(store: Store, reader: RowReader, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the tokens of some rows, float64[b, N, D]."""
    stored: NDArray[Any] = np.empty((len(rows), *reader.row_shape), reader.dtype)
    reader.read(rows, stored)
    return store.decode(stored).astype(np.float64)
