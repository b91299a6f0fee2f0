"""Rows of all shards as one array: whole batches at once are what single rows are, and damage is found as before."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from shards.errors import StoreDamagedError
from shards.metadata.layout import field_of
from shards.reading.row_window import RowWindow
from shards.testing.contract import StoreKind, build_store, expected_row, same_bits

pytestmark = pytest.mark.skipif(not RowWindow.is_supported(), reason="files are mapped one by one here")


@pytest.fixture
def store(tmp_path):
    return build_store(tmp_path / "store", StoreKind())


@pytest.fixture
def gathered(monkeypatch):
    """Numbers of rows that were copied as one array."""
    numbers, gather = [], RowWindow.gather
    monkeypatch.setattr(
        RowWindow,
        "gather",
        lambda window, entries, *more: (numbers.append(len(entries)), gather(window, entries, *more))[1],
    )
    return numbers


def batch_of(store, rows, reader, at=None):
    out = np.zeros((len(rows), *reader.row_shape), reader.dtype)
    reader.read(rows, out, at)
    return out


@pytest.mark.parametrize("order", ["in order", "behind each other", "spread"])
def test_a_batch_is_gathered_into_any_slots(store, order, gathered):
    reader = store.reader("center", "tokens", mode="mmap")
    rows = np.random.default_rng(0).permutation(np.repeat(store.valid_rows, 3))
    at = {"in order": None, "behind each other": np.arange(len(rows)), "spread": np.arange(len(rows))[::-1]}[
        order
    ]
    out = batch_of(store, rows, reader, at)
    field = field_of(store.recipe, "center", "tokens")
    expected = np.stack([expected_row(field, row) for row in rows.tolist()])
    assert same_bits(out if at is None else out[at], expected)
    assert gathered == [len(rows)], "the rows were read one by one"


def test_threads_that_map_the_same_shards_read_the_same(store):
    reader = store.reader("center", "tokens", mode="mmap")
    rows = np.resize(store.valid_rows, 200)
    with ThreadPoolExecutor(8) as pool:
        batches = list(pool.map(lambda _: batch_of(store, rows, reader), range(32)))
    assert all(same_bits(batch, batches[0]) for batch in batches)


def test_rows_without_an_image_are_named(store):
    absent = np.setdiff1d(np.arange(store.num_rows), store.valid_rows)[0]
    rows = np.append(np.resize(store.valid_rows, 30), absent)
    with pytest.raises(StoreDamagedError, match=rf"row {absent} of shard .* holds no image"):
        batch_of(store, rows, store.reader("center", "tokens", mode="mmap"))


def test_a_shard_that_is_shortened_is_named_before_its_rows_are_touched(store):
    reader = store.reader("center", "tokens", mode="auto")
    rows = np.resize(store.valid_rows, 64)
    batch_of(store, rows, reader)
    os.truncate(store.path / "center/tokens/c/1/0/0", 10)
    time.sleep(0.01)  # its size was looked up over a millisecond ago
    with pytest.raises(StoreDamagedError, match=r"shard 1 .*truncated"):
        batch_of(store, rows, reader)


def test_large_rows_are_read_one_by_one(store, monkeypatch, gathered):
    monkeypatch.setattr("shards.reading.reader.MOST_ROW_NBYTES", 1)
    reader = store.reader("center", "tokens", mode="mmap")
    rows = np.resize(store.valid_rows, 64)
    field = field_of(store.recipe, "center", "tokens")
    assert same_bits(
        batch_of(store, rows, reader), np.stack([expected_row(field, row) for row in rows.tolist()])
    )
    assert gathered == []
