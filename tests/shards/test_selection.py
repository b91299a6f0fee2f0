"""Every row that is asked for is in the new store once, under its key, whichever shard it is in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import UsageError
from shards.metadata.plan import Plan
from shards.testing.contract import StoreKind, build_store, tiny_records
from shards.writing.selection import Part, every_row, reshuffled


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Two stores of other images; of the second, keys begin with b."""
    root = tmp_path_factory.mktemp("stores")
    one = build_store(root / "one", StoreKind(num_images=7, num_shards=3, views=("center",), bad={2: "bad"}))
    other = build_store(root / "other", StoreKind(num_images=5, num_shards=2, views=("center",), prefix="b/"))
    return one, other


@given(data=st.data(), seed=st.integers(0, 3))
def test_the_rows_of_a_selection_are_those_asked_for(stores, data, seed):
    chosen = [
        np.array(data.draw(st.lists(st.integers(0, s.plan.num_images - 1), unique=True)), np.int64)
        for s in stores
    ]
    total = sum(len(images) for images in chosen)
    if not total:
        return
    num_shards = data.draw(st.integers(1, total))
    parts = [Part(store, images) for store, images in zip(stores, chosen, strict=True)]
    selection = reshuffled(parts, stores[0].class_names, num_shards, seed)
    got = set()
    for key, label, index, row in zip(
        selection.plan.keys, selection.plan.labels, selection.store_of, selection.row_of, strict=True
    ):
        old = stores[index].plan
        image = int(np.searchsorted(old.rows, row))
        assert old.rows[image] == row
        assert (old.keys[image], old.labels[image]) == (key, label)
        got.add((int(index), image))
    assert got == {(index, image) for index, images in enumerate(chosen) for image in images.tolist()}


def test_all_rows_reshuffled_are_the_plan_of_an_encode_into_that_many_shards(stores):
    store = stores[0]
    selection = reshuffled([Part(store, np.arange(7)[::-1])], store.class_names, 2, store.recipe.seed)
    assert selection.plan == Plan.build(tiny_records(7), store.class_names, 2, store.recipe.seed)
    assert selection.plan.source_digest() == store.recipe.source_digest
    assert every_row(store).plan == store.plan


def test_labels_can_change_and_having_none_stays_having_none(stores):
    store = stores[0]
    part = Part(store, np.arange(7), np.array([5, 4, 3]))
    plan = reshuffled([part], tuple("abcdef"), 1, 0).plan
    new = dict(zip(plan.keys, plan.labels.tolist(), strict=True))
    for key, label in zip(store.plan.keys, store.plan.labels.tolist(), strict=True):
        assert new[key] == (5 - label if label >= 0 else -1)


def test_a_selection_of_nothing_and_a_key_twice_are_refused(stores):
    store = stores[0]
    with pytest.raises(UsageError, match="at least one source image"):
        reshuffled([Part(store, np.arange(0))], (), 1, 0)
    with pytest.raises(UsageError, match="must be unique"):
        reshuffled([Part(store, np.arange(2)), Part(store, np.arange(1))], (), 1, 0)
