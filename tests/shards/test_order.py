"""The order is a pure function of seed and position, covers every row once an epoch, and never changes."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.draws import choices, even_spread, permutation, raw_bits, shuffled_within
from shards.errors import UsageError
from shards.reading.order import RowOrder, share, shuffle_quality


def test_the_first_rows_of_the_stream_are_frozen():
    order = RowOrder(np.arange(1000), seed=0)
    assert order.rows(0, 10).tolist() == [568, 258, 444, 743, 777, 309, 41, 236, 894, 710]
    assert order.rows(1000, 5).tolist() == [477, 770, 593, 121, 330]
    assert RowOrder(np.arange(1000), 0, 2, capacity=100).rows(0, 10).tolist() == [
        444,
        477,
        432,
        415,
        417,
        414,
        412,
        458,
        101,
        125,
    ]
    assert choices(5, 12, 2, seed=0, stream="view").tolist() == [1, 1, 0, 1, 0, 1, 1, 0, 1, 0, 1, 0]


@given(st.integers(1, 300), st.integers(0, 2**40), st.sampled_from([None, 0, 1, 3]))
def test_every_epoch_holds_every_row_once(size, seed, group):
    rows = np.arange(0, 3 * size, 3)
    order = RowOrder(rows, seed, group, capacity=7)
    for epoch in (0, 1, 5):
        assert np.array_equal(np.sort(order.rows(epoch * size, size)), rows)


@given(st.integers(1, 50), st.integers(0, 400), st.integers(0, 200))
def test_the_stream_can_be_entered_anywhere(size, start, count):
    whole = RowOrder(np.arange(size), 1).rows(0, start + count)
    assert np.array_equal(RowOrder(np.arange(size), 1).rows(start, count), whole[start:])


def test_epochs_and_seeds_differ():
    order = RowOrder(np.arange(500), 1)
    assert not np.array_equal(order.epoch(0), order.epoch(1))
    assert not np.array_equal(order.epoch(0), RowOrder(np.arange(500), 2).epoch(0))


def test_a_group_keeps_its_shards_together_and_mixes_them():
    order = RowOrder(np.arange(1000), 0, 2, capacity=100).epoch(0)
    shards = order // 100
    for first in range(0, 1000, 200):
        assert len(np.unique(shards[first : first + 200])) == 2
        assert len(np.unique(shards[first : first + 20])) == 2


def test_group_0_is_the_order_of_the_store():
    rows = np.array([0, 2, 5, 9])
    assert RowOrder(rows, 3, 0).rows(2, 6).tolist() == [5, 9, 0, 2, 5, 9]


def test_a_wrong_group_or_an_empty_store_is_refused():
    with pytest.raises(UsageError, match="not -1"):
        RowOrder(np.arange(3), 0, -1)
    with pytest.raises(UsageError, match="without a valid row"):
        RowOrder(np.arange(0), 0)
    with pytest.raises(ValueError, match="capacity"):
        RowOrder(np.arange(3), 0, 2)


@given(st.integers(1, 200), st.integers(1, 16))
def test_shares_are_contiguous_cover_the_batch_and_differ_by_at_most_one(batch, world):
    shares = [share(batch, rank, world) for rank in range(world)]
    assert [i for part in shares for i in part] == list(range(batch))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_order_of_imagenet_costs_little_time_and_memory():
    rows = np.arange(1_300_000, dtype=np.int64)
    times = []
    for epoch in range(3):
        begun = time.process_time()
        RowOrder(rows, 0).epoch(epoch)
        times.append(time.process_time() - begun)
    assert min(times) < 0.2
    tracemalloc.start()
    RowOrder(rows, 0).epoch(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64e6


def test_shuffle_quality_is_one_for_a_full_shuffle_and_falls_with_locality():
    rows = np.arange(64 * 100)
    quality = {
        group: shuffle_quality(RowOrder(rows, 0, group, capacity=100).epoch(0), 100, window=64)
        for group in (None, 64, 16, 4, 1, 0)
    }
    assert quality[None] == pytest.approx(1, abs=0.03)
    assert quality[64] == pytest.approx(1, abs=0.03)
    assert quality[64] > quality[16] > quality[4] > quality[1] > 0
    # 64 rows in their stored order come from one shard or two, of the 40.6 expected
    assert quality[0] == pytest.approx(1.63 / 40.6, abs=0.002)


def test_draws_can_be_entered_anywhere_and_streams_are_apart():
    whole = raw_bits(0, 100, seed=1, stream="a")
    assert np.array_equal(raw_bits(37, 63, seed=1, stream="a"), whole[37:])
    for other in (
        {"seed": 2, "stream": "a"},
        {"seed": 1, "stream": "b"},
        {"seed": 1, "stream": "a", "epoch": 1},
    ):
        assert not np.isin(raw_bits(0, 100, **other), whole).any()


@given(st.integers(1, 40), st.integers(1, 5))
def test_shuffling_within_groups_keeps_the_groups_in_order(size, num_groups):
    groups = np.arange(size, dtype=np.uint64) % num_groups
    order = shuffled_within(groups, seed=3, stream="s")
    assert sorted(order.tolist()) == list(range(size))
    assert (np.diff(groups[order].astype(np.int64)) >= 0).all()


def test_a_permutation_is_fair():
    """Each of six items is in each place about equally often."""
    counts = np.zeros((6, 6))
    for seed in range(3000):
        counts[np.arange(6), permutation(6, seed=seed, stream="fair")] += 1
    chi_square = ((counts - 500) ** 2 / 500).sum()
    assert chi_square < 52.6  # 25 degrees of freedom: 0.1 % of fair shuffles are beyond


@pytest.mark.parametrize("num_options", [1, 2, 3, 7])
def test_choices_are_even(num_options):
    counts = np.bincount(choices(3, 42_000, num_options, seed=0, stream="view"), minlength=num_options)
    assert len(counts) == num_options
    expected = 42_000 / num_options
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


@given(st.integers(0, 40), st.integers(0, 10**9))
def test_an_even_spread_has_both_ends_and_steps_that_differ_by_at_most_one(count, total):
    spread = even_spread(count, total)
    assert len(spread) == min(count, total)
    steps = np.diff(spread)
    if len(spread) > 1:
        assert (spread[0], spread[-1]) == (0, total - 1)
        assert 1 <= steps.min() <= steps.max() <= steps.min() + 1
