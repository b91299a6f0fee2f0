"""Stores read as one: rows, labels and statistics of each, in shares; unlike stores are refused."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from shards import IdentityMismatchError, Loader, MixedStore, Phase, UsageError
from shards.testing.contract import StoreKind, build_store

KIND = StoreKind(views=("center",), bad={3: "broken"})
OTHER = replace(
    KIND, num_images=40, num_shards=3, prefix="other/", class_names=("dog", "bird", "cat"), bad={}
)
BATCH = 8


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    return build_store(folder / "a", KIND), build_store(folder / "b", OTHER)


@pytest.fixture
def mixed(stores):
    return MixedStore(stores, [Phase(0, (1, 3)), Phase(40, (1, 0))])


def batches(store, count, **settings):
    with Loader(
        store, views=("center",), seed=0, global_batch_size=BATCH, fields=("tokens", "image"), **settings
    ) as loader:
        found = []
        for batch in itertools.islice(loader, count):
            arrays = {name: array.copy() for name, array in batch.arrays.items()}
            found.append((batch.positions, batch.rows, batch.labels, arrays))
            batch.release()
        return found


def test_rows_and_labels_are_those_of_their_store(stores, mixed):
    assert mixed.class_names == ("cat", "dog", "größe", "bird")
    names = {"a": KIND.class_names, "b": OTHER.class_names}
    seen = set()
    for _, rows, labels, arrays in batches(mixed, 30):
        for index, (row, label) in enumerate(zip(rows.tolist(), labels.tolist(), strict=True)):
            store = stores[row >= stores[0].num_rows]
            own = row - (stores[0].num_rows if store is stores[1] else 0)
            for field in ("tokens", "image"):
                reader = store.reader("center", field)
                expected = np.empty((1, *reader.row_shape), reader.dtype)
                reader.read([own], expected)
                assert np.array_equal(arrays[field][index], expected[0])
            old = int(store.labels[own])
            assert label == (-1 if old < 0 else mixed.class_names.index(names[store.path.name][old]))
            seen.add(store.path.name)
    assert seen == {"a", "b"}


def test_any_number_of_ranks_reads_the_same_stream(mixed):
    whole = np.concatenate([rows for _, rows, _, _ in batches(mixed, 60)])
    parts = [batches(mixed, 60, rank=rank, world_size=3) for rank in range(3)]
    together = np.concatenate([np.concatenate([part[step][1] for part in parts]) for step in range(60)])
    assert np.array_equal(together, whole)
    later = np.concatenate([rows for _, rows, _, _ in batches(mixed, 10, start_sample=50 * BATCH)])
    assert np.array_equal(later, whole[50 * BATCH :])


def test_weights_hold_from_their_step_on(stores, mixed):
    rows = np.concatenate([rows for _, rows, _, _ in batches(mixed, 60)])
    from_second = rows >= stores[0].num_rows
    assert 0.6 < from_second[: 40 * BATCH].mean() < 0.9
    assert not from_second[40 * BATCH :].any()


def test_statistics_are_those_of_the_stream(stores):
    mixed = MixedStore(stores, [Phase(0, (1, 3))])
    parts = [store.statistics() for store in stores]
    mean = 0.25 * parts[0].mean + 0.75 * parts[1].mean
    square = sum(w * (p.variance + p.mean**2) for w, p in zip((0.25, 0.75), parts, strict=True))
    assert np.allclose(mixed.statistics().mean, mean)
    assert np.allclose(mixed.statistics().variance, square - mean**2)


def test_the_identity_is_that_of_all_stores_and_how_they_are_mixed(stores):
    ids = {
        MixedStore(stores, [Phase(0, (1, 3))]).id,
        MixedStore(stores, [Phase(0, (1, 2))]).id,
        MixedStore(stores, [Phase(0, (1, 3))], "step").id,
        MixedStore(stores[::-1], [Phase(0, (1, 3))]).id,
        stores[0].id,
    }
    assert len(ids) == 5


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"grid": (1, 6)}, "encoder"),
        ({"dtype": "float32"}, "dtype is 'float16'.*convert or encode"),
        ({"image_size": 4}, "image_size is 8"),
        ({"class_names": ("cat", "cat", "dog")}, "'cat' more than once"),
    ],
)
def test_stores_of_another_kind_are_refused(stores, tmp_path, change, match):
    other = build_store(tmp_path / "store", replace(OTHER, **change))
    with pytest.raises((IdentityMismatchError, UsageError), match=match):
        MixedStore([stores[0], other], [Phase(0, (1, 1))])


def test_weights_must_fit_the_stores_and_one_folder_is_not_there(stores, mixed):
    with pytest.raises(UsageError, match="2 stores need 2 weights, got 3"):
        MixedStore(stores, [Phase(0, (1, 1, 1))])
    with pytest.raises(UsageError, match="needs one store"):
        _ = mixed.path
