"""Several stores in one stream: exact shares, each store's own order, any cut gives the same rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import UsageError
from shards.reading.mixture import BLOCK, MixtureOrder, Phase
from shards.reading.order import RowOrder

SIZES = (100, 37, 1000)
BASES = (0, 100, 137)


def mixture(*phases, unit="sample", batch=16, seed=0):
    orders = [RowOrder(np.arange(size), seed) for size in SIZES]
    phases = [Phase(*phase) for phase in phases] or [Phase(0, (1, 2, 1))]
    return MixtureOrder(orders, BASES, phases, unit=unit, seed=seed, global_batch_size=batch)


def own_rows(rows, store):
    """The rows of a stream that come from a store, by the store's own numbers."""
    end = (*BASES, sum(SIZES))[store + 1]
    return rows[(rows >= BASES[store]) & (rows < end)] - BASES[store]


@pytest.mark.parametrize("unit", ["sample", "step"])
def test_each_store_goes_through_its_own_stream(unit):
    rows = mixture((0, (1, 2, 1)), (50, (1, 0, 0)), (90, (0, 1, 3)), unit=unit).rows(0, 16 * 200)
    for store, size in enumerate(SIZES):
        own = own_rows(rows, store)
        assert np.array_equal(own, RowOrder(np.arange(size), 0).rows(0, len(own)))


@given(st.data())
def test_any_cut_of_the_stream_gives_the_same_rows(data):
    unit = data.draw(st.sampled_from(["sample", "step"]))
    order = mixture((0, (1, 2, 1)), (7, (3, 0, 1)), (8, (0, 1, 1)), unit=unit)
    whole = order.rows(0, 400)
    start = data.draw(st.integers(0, 400))
    count = data.draw(st.integers(0, 400 - start))
    assert np.array_equal(order.rows(start, count), whole[start : start + count])


def test_a_stream_is_entered_far_on_without_what_comes_before():
    start = 3 * BLOCK - 5
    order, later = mixture(), mixture()
    assert np.array_equal(order.rows(0, 3 * BLOCK + 100)[start:], later.rows(start, 105))


def test_shares_of_a_block_are_exact():
    counts = np.bincount(mixture((0, (0.7, 0.3, 0))).stores(0, BLOCK), minlength=3)
    assert counts.tolist() == [45875, 19661, 0]


def test_a_step_comes_from_one_store():
    stores = mixture(unit="step").stores(0, 16 * 100).reshape(100, 16)
    assert (stores == stores[:, :1]).all()
    assert len(set(stores[:, 0].tolist())) == 3


def test_weights_change_at_their_step():
    stores = mixture((0, (1, 0, 0)), (10, (0, 0, 1))).stores(0, 16 * 20)
    assert set(stores[: 16 * 10].tolist()) == {0}
    assert set(stores[16 * 10 :].tolist()) == {2}


@pytest.mark.parametrize(
    ("phases", "match"),
    [
        ([(0, (0, 0, 0))], "positive sum"),
        ([(0, (1, -1, 1))], "0 or more"),
        ([(0, (1, float("nan"), 1))], "0 or more"),
        ([(0, (1, 1e-6, 1))], "less than 1/65536"),
        ([(5, (1, 1, 1))], "from step 0"),
        ([(0, (1, 1, 1)), (0, (1, 1, 1))], "ascending"),
        ([(0, (1, 1))], "3 weights"),
    ],
)
def test_weights_that_are_no_shares_are_refused(phases, match):
    with pytest.raises(UsageError, match=match):
        mixture(*phases)


def test_the_first_rows_never_change():
    assert mixture().rows(0, 12).tolist() == [111, 126, 125, 103, 41, 11, 119, 705, 136, 26, 108, 118]
