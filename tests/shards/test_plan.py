"""The plan assigns every image to one slot of one shard, and is the same when it is read back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import StoreDamagedError, UsageError
from shards.metadata.plan import Plan, SourceRecord
from shards.metadata.stages import planned_rows
from shards.testing.contract import tiny_records


@st.composite
def sizes(draw):
    num_images = draw(st.integers(1, 60))
    return num_images, draw(st.integers(1, num_images))


@given(sizes(), st.integers(-5, 5))
def test_every_image_gets_one_row_and_shards_differ_by_at_most_one(size, seed):
    num_images, num_shards = size
    plan = Plan.build(tiny_records(num_images), ["a", "b", "c"], num_shards, seed)
    counts = [plan.shard_size(shard) for shard in range(num_shards)]
    assert sum(counts) == num_images
    assert max(counts) - min(counts) <= 1
    assert max(counts) == plan.capacity
    rows = [row for shard in range(num_shards) for row in plan.rows_of(shard)]
    assert rows == plan.rows.tolist()
    keys = [record.key for shard in range(num_shards) for record in plan.records_of(shard)]
    assert keys == plan.keys.tolist()
    assert sorted(keys) == sorted(record.key for record in tiny_records(num_images))


@given(sizes())
def test_rows_are_shard_times_capacity_plus_place(size):
    num_images, num_shards = size
    rows = planned_rows(num_images, num_shards)
    capacity = -(-num_images // num_shards)
    assert len(rows) == num_images
    assert rows.max(initial=0) < capacity * num_shards
    assert len(np.unique(rows // capacity)) == num_shards


def test_the_plan_does_not_depend_on_the_order_of_the_listing():
    records = tiny_records(40)
    assert Plan.build(records, ["a"], 7, 3) == Plan.build(records[::-1], ["a"], 7, 3)


def test_another_seed_gives_another_plan():
    assert Plan.build(tiny_records(40), ["a"], 7, 3) != Plan.build(tiny_records(40), ["a"], 7, 4)


def test_the_deal_is_frozen():
    plan = Plan.build(tiny_records(12), ["a"], 4, 0)
    assert [int(key[-8:-4]) for key in plan.keys] == [9, 1, 2, 11, 0, 8, 10, 3, 4, 6, 5, 7]


def test_a_plan_reads_back_as_it_was_written(tmp_path):
    plan = Plan.build(tiny_records(23), ["cat", "größe"], 5, 9)
    (tmp_path / "plan.parquet").write_bytes(plan.to_bytes())
    again = Plan.read(tmp_path / "plan.parquet")
    assert again == plan
    assert (again.class_names, again.num_shards, again.seed) == (("cat", "größe"), 5, 9)
    for name in ("labels", "keys", "uris", "offsets", "nbytes"):
        assert np.array_equal(getattr(again, name), getattr(plan, name))


def test_the_same_plan_is_written_as_the_same_bytes(tmp_path):
    plan = Plan.build(tiny_records(23), ["cat"], 5, 9)
    (tmp_path / "one").write_bytes(plan.to_bytes())
    assert Plan.read(tmp_path / "one").to_bytes() == (tmp_path / "one").read_bytes()


def test_the_source_digest_knows_keys_sizes_labels_and_classes():
    base = Plan.build(tiny_records(5), ["a"], 2, 0)
    assert base.source_digest() == Plan.build(tiny_records(5), ["a"], 3, 1).source_digest()
    for changed in (
        SourceRecord("other", 0, "/nowhere", 0, 100),
        SourceRecord(tiny_records(1)[0].key, -1, "/nowhere", 0, 99),
        SourceRecord(tiny_records(1)[0].key, 1, "/nowhere", 0, 100),
    ):
        records = [changed, *tiny_records(5)[1:]]
        assert Plan.build(records, ["a"], 2, 0).source_digest() != base.source_digest()
    assert Plan.build(tiny_records(5), ["b"], 2, 0).source_digest() != base.source_digest()


@pytest.mark.parametrize("num_shards", [0, 6])
def test_more_shards_than_images_or_none_are_refused(num_shards):
    with pytest.raises(UsageError, match=f"between 1 and the 5 images, not {num_shards}"):
        Plan.build(tiny_records(5), [], num_shards, 0)


def test_an_empty_listing_is_refused():
    with pytest.raises(UsageError, match="at least one source image"):
        Plan.build([], [], 1, 0)


def test_a_key_that_comes_twice_is_refused_with_both_places():
    records = [SourceRecord("k", 0, "/a", 0, 1), SourceRecord("k", 0, "/b", 0, 1)]
    with pytest.raises(UsageError, match="'k' comes twice: /a and /b"):
        Plan.build(records, [], 1, 0)


@pytest.mark.parametrize("content", [b"", b"not parquet", b"PAR1"])
def test_a_file_that_is_no_plan_is_refused(tmp_path, content):
    (tmp_path / "plan.parquet").write_bytes(content)
    with pytest.raises(StoreDamagedError, match="not a readable plan"):
        Plan.read(tmp_path / "plan.parquet")


def test_records_by_index_are_those_of_the_shards_in_order():
    plan = Plan.build(tiny_records(7), ["a", "b"], 3, seed=2)
    every = [record for shard in range(3) for record in plan.records_of(shard)]
    assert plan.records(np.array([5, 0, 6])) == [every[5], every[0], every[6]]
